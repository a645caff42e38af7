"""Made-up scenes: the same for a seed, in the real layout, and hard for radar as they are meant to be."""

import os
import shutil

import numpy as np
import pytest
import rasterio

from sarjax.data.synthesis import SHARES, WATER, make_scene, scene_name, synthesize
from sarjax.errors import UserError


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(5, i, (512, 512)) for i in range(6)]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def nearest_mean_accuracy(pixels, labels):
    """Mean over classes of the accuracy of the class with the nearest mean, on the pixels that gave the means."""
    classes = np.unique(labels)
    means = np.stack([pixels[labels == c].mean(0) for c in classes])
    guess = classes[(((pixels[:, None] - means) / pixels.std(0)) ** 2).sum(-1).argmin(1)]
    return np.mean([(guess[labels == c] == c).mean() for c in classes])


def test_a_scene_is_a_function_of_seed_and_index(tmp_path):
    few = contents(synthesize(tmp_path / "few", 2, (200, 130), seed=3))
    many = contents(synthesize(tmp_path / "many", 3, (200, 130), seed=3))
    other = contents(synthesize(tmp_path / "other", 2, (200, 130), seed=4))
    images = [name for name in few if name.endswith(".tif")]
    assert len(images) == 6
    assert all(few[name] == many[name] for name in images)
    assert all(few[name] != other[name] for name in images)
    assert few[images[0]] != few[images[1]]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_layout_is_the_real_one(tmp_path):
    out = synthesize(tmp_path / "mit Leerzeichen é", 1, (140, 90), seed=0)
    (name,) = os.listdir(out / "sar")
    for folder, bands in (("optical", 4), ("sar", 1), ("lbl", 1)):
        with rasterio.open(out / folder / name) as f:
            assert (f.width, f.height, f.count, f.dtypes[0]) == (140, 90, bands, "uint8")
            assert f.compression.name == "lzw"
    assert name == scene_name(0)


def test_made_up_names_are_like_real_ones_and_are_none():
    from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import _official

    names = [scene_name(i) for i in range(24 * 24)]
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {len(name) for name in _official()}
    assert not set(names) & set(_official())


def test_every_scene_has_its_own_speckle():
    images = []
    for i in range(2):
        scene = make_scene(0, i, (256, 256))
        images.append((scene.sar[0].astype(np.float64), scene.label[0] == 50))
    both = images[0][1] & images[1][1]
    assert both.sum() > 1000
    assert abs(np.corrcoef(images[0][0][both], images[1][0][both])[0, 1]) < 0.15


def test_a_band_of_rows_is_the_same_whatever_is_rendered_with_it():
    from sarjax.data.synthesis import _Landscape

    land = _Landscape(1, 2, 300, 400)
    columns = np.arange(300)
    whole, part = land.ground(np.arange(400), columns), land.ground(np.arange(256, 300), columns)
    np.testing.assert_array_equal(whole.cover[256:300], part.cover)
    np.testing.assert_array_equal(whole.parcel[256:300], part.parcel)


def test_shares_of_classes(scenes):
    share = np.bincount(np.concatenate([s.label[0].ravel() // 10 for s in scenes]), minlength=8) / (6 * 512 * 512)
    for c, wanted in SHARES.items():
        assert wanted / 2 < share[c] < wanted * 2, c
    assert 0.2 < share[1] < 0.5
    assert 0.004 < share[6] < 0.025
    assert share[0] < 0.05


def test_optical_tells_classes_apart_and_radar_only_in_part(scenes):
    label = np.concatenate([s.label[0].ravel() for s in scenes])[::11]
    seen = label > 0
    optical = np.concatenate([s.optical[0].reshape(-1, 4) for s in scenes])[::11][seen].astype(np.float32)
    sar = np.concatenate([s.sar[0].ravel() for s in scenes])[::11][seen, None].astype(np.float32)
    by_optical, by_sar = (nearest_mean_accuracy(x, label[seen]) for x in (optical, sar))
    assert by_optical > 0.7
    assert 0.25 < by_sar < 0.5
    # The published check of alignment: NDWI is higher on water than elsewhere.
    ndwi = (optical[:, 1] - optical[:, 3]) / (optical[:, 1] + optical[:, 3])
    water = label[seen] == WATER * 10
    assert ndwi[water].mean() - ndwi[~water].mean() > 0.18


def test_speckle_is_multiplicative(scenes):
    """On water and on fields alike the amplitude varies by a share of itself, as few looks make it."""
    for c, wanted in ((WATER, 0.3), (1, 0.32)):
        values = np.concatenate([s.sar[0][s.label[0] == c * 10] for s in scenes]).astype(np.float64)
        assert abs(values.std() / values.mean() - wanted) < 0.1


def test_no_data_is_zero_in_both(scenes):
    for s in scenes:
        outside = s.label[0] == 0
        assert not s.sar[0][outside].any()
        assert not s.optical[0][outside].any()
        assert s.sar[0][~outside].all()
        assert s.optical[0][~outside].all()


def test_two_dates(tmp_path):
    scene = make_scene(2, 0, (512, 400), dates=2)
    changed = scene.label[0] != scene.label[1]
    assert 0.005 < changed.mean() < 0.15
    np.testing.assert_array_equal(scene.change == 255, changed)
    # Fields that stay fields look different, and so does their radar image: season is no change of land cover.
    fields = ~changed & (scene.label[0] == 10)
    nir = [s[..., 3][fields].mean() for s in scene.optical]
    assert abs(nir[1] - nir[0]) > 8
    assert abs(scene.sar[1][fields].mean() - scene.sar[0][fields].mean()) > 3
    out = synthesize(tmp_path / "s", 1, (100, 100), dates=2)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        *("change", "lbl", "lbl_2", "optical", "optical_2", "sar", "sar_2")
    ]


def test_it_is_all_or_nothing(tmp_path):
    def stop(stage, done, total):
        if done == 1:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        synthesize(tmp_path / "s", 2, (64, 64), progress=stop)
    assert os.listdir(tmp_path) == []
    (tmp_path / "s").mkdir()
    synthesize(tmp_path / "s", 2, (64, 64))
    assert os.listdir(tmp_path) == ["s"]


def test_what_is_there_is_kept(tmp_path):
    out = synthesize(tmp_path / "s", 1, (64, 64))
    before = contents(out)
    assert synthesize(out, 1, (64, 64)) == out
    assert contents(out) == before
    with pytest.raises(
        UserError, match="is not empty and does not hold these scenes: --out takes a new or empty folder"
    ):
        synthesize(out, 1, (64, 64), seed=1)
    shutil.rmtree(out)
    out.touch()
    with pytest.raises(UserError, match="s is a file"):
        synthesize(out, 1, (64, 64))
    with pytest.raises(UserError, match=r"cannot write scenes to .*s/x: "):
        synthesize(out / "x", 1, (64, 64))


@pytest.mark.parametrize(("scenes", "size", "dates"), [(0, (64, 64), 1), (1, (63, 64), 1), (1, (64, 64), 3)])
def test_impossible_numbers(tmp_path, scenes, size, dates):
    with pytest.raises(UserError, match="at least 1 scene of at least 64x64"):
        synthesize(tmp_path / "s", scenes, size, dates=dates)
