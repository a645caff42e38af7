"""OMBRIA, built from fake files in its real format: arrays come back equal, bad sources in one sentence."""

import shutil

import fake_data
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sarjax import raster
from sarjax.data.build import build, builder_class
from sarjax.data.imagery import gaps, read_image
from sarjax.data.layout import Options
from sarjax.data.store import open_directory
from sarjax.errors import UserError


def damaged(source, path):
    """`path` under `source`, which must be there."""
    assert (source / path).exists()
    return source / path


def test_every_tile_comes_back(ombria):
    files, dataset = ombria
    tiles = fake_data.all_tiles(dataset)
    assert sorted(name.split("/")[1] for _, name, _ in tiles) == sorted(files)
    for _, name, tile in tiles:
        file = files[name.split("/")[1]]
        assert int(tile["id"]) == int(name.split("/")[1])
        np.testing.assert_array_equal(tile["sar_valid"], ~file.no_sar)
        np.testing.assert_array_equal(tile["optical_valid"], ~file.no_optical)
        np.testing.assert_array_equal(tile["sar"][..., 0], np.where(file.no_sar, 0, file.sar))
        np.testing.assert_array_equal(tile["optical"], file.optical)
        unseen = (file.no_sar & file.no_optical).all(0)
        np.testing.assert_array_equal(tile["label"], np.where(unseen, 255, file.mask // 255))


def test_splits(ombria):
    _, dataset = ombria
    names = {split: dataset.split(split).names for split in dataset.splits}
    assert names == {
        "train": tuple(f"train/{n}" for n in ("0001", "0002", "0005", "0011", "0014", "0019")),
        "val": ("train/0003", "train/0020"),
        "test": ("test/0013", "test/0018"),
    }


def test_a_tile_keeps_its_split_whatever_else_is_there():
    from sarjax_datasets.ombria.ombria_dataset_builder import in_validation

    numbers = [f"{n:04d}" for n in range(1, 786)]
    assert 0.14 < np.mean([in_validation(n) for n in numbers]) < 0.19


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: shutil.rmtree(damaged(s, "OmbriaS2")), "has no folder OmbriaS2: .*holds OmbriaS1 and OmbriaS2"),
        (
            lambda s: shutil.rmtree(damaged(s, "OmbriaS1/test/MASK")),
            "OmbriaS1/test/MASK is missing: .*S1_mask_NNNN",
        ),
        (
            lambda s: damaged(s, "OmbriaS1/train/BEFORE/S1_before_0001.png").write_bytes(b""),
            r"S1_before_0001.png is empty \(0 bytes\)",
        ),
        (
            lambda s: damaged(s, p := "OmbriaS1/train/BEFORE/S1_before_0001.png").write_bytes(
                (s / p).read_bytes()[:9000]
            ),
            "S1_before_0001.png cannot be read: it is truncated",
        ),
        (
            lambda s: Image.new("L", (256, 255)).save(damaged(s, "OmbriaS1/train/AFTER/S1_after_0001.png")),
            "S1_after_0001.png is 256 x 255 pixels, but .*S1_before_0001.png is 256 x 256: they must agree",
        ),
        (
            lambda s: Image.new("L", (256, 256), 7).save(damaged(s, "OmbriaS1/train/MASK/S1_mask_0001.png")),
            "S1_mask_0001.png holds the label 7: labels are 0, 255",
        ),
        (
            lambda s: Image.new("RGB", (256, 256)).save(damaged(s, "OmbriaS1/test/AFTER/S1_after_0013.png")),
            "S1_after_0013.png has 3 bands, but 1 of sar are expected: VV",
        ),
        (
            lambda s: [
                Image.new("RGB" if "OmbriaS2" in str(p) and "MASK" not in str(p) else "L", (257, 256)).save(p)
                for p in s.rglob("*0013.png")
            ],
            "S1_before_0013.png is 257 x 256 pixels, but 256 x 256 is expected",
        ),
    ],
)
def test_a_bad_source_is_named(tmp_path, ombria_source, damage, message):
    damage(ombria_source)
    with pytest.raises(UserError, match=message) as e:
        build("ombria", ombria_source, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not any((tmp_path / "out").iterdir())


def test_an_incomplete_tile_is_left_out(tmp_path, ombria_source):
    damaged(ombria_source, "OmbriaS2/train/AFTER/S2_after_0002.png").unlink()
    said = []
    dataset = open_directory(build("ombria", ombria_source, tmp_path / "out", say=said.append))
    assert dataset.split("train").names == ("train/0001",)
    (line,) = said
    assert line.endswith("OmbriaS2/train/AFTER/S2_after_0002.png is missing: scene train/0002 is left out.")


def test_a_saturated_pixel_is_real_and_a_stripe_is_not():
    sar = builder_class("ombria").spec_of().modality("sar")
    image = np.zeros((256, 256), bool)
    image[0, 10:16] = True  # six real echoes at the border: the most in the real images
    assert not gaps(image, sar.smallest_gap).any()
    image[:, 0] = True
    assert gaps(image, sar.smallest_gap).sum() == 256


def test_the_real_images(shared_data):
    layout = builder_class("ombria").layout(shared_data / "ombria")
    assert layout.problems == ()
    sar = layout.spec.modality("sar")
    test = [scene for scene in layout.scenes if layout.splits[scene.name] == "test"]
    assert len(test) == 70
    no_data, saturated = [], []
    for path in (path for scene in test for path in scene.images["sar"]):
        with raster.open_raster(path) as f:
            no_data.append(~read_image(f, sar, (0, 0, 256, 256))[1])
            saturated.append(f.read()[..., 0] == 255)
    no_data, saturated = np.stack(no_data), np.stack(saturated)
    assert 0.001 < no_data.mean() < 0.01
    # What remains at 255 is a handful of echoes per image.
    assert (saturated & ~no_data).sum((1, 2)).max() < 20
    assert (saturated.sum((1, 2)) > 0).all()
    # No bright town inside an image is as large as a gap: all gaps lie at the border.
    for mask in no_data:
        regions, count = ndimage.label(mask, np.ones((3, 3)))
        border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        assert set(range(1, count + 1)) <= set(border)


def test_a_number_is_in_one_part(tmp_path, ombria_source):
    fake_data.write_ombria(ombria_source, train=(), test=("0001",))
    with pytest.raises(UserError, match="train/0001 and test/0001 have one number: a tile is in one split"):
        build("ombria", ombria_source, tmp_path / "out")
    layout = builder_class("ombria").layout(ombria_source, options=Options(("test/0001",)))
    assert not layout.problems


def test_an_incomplete_tile_may_be_excluded(ombria_source):
    (ombria_source / "OmbriaS1/train/MASK/S1_mask_0001.png").unlink()
    layout = builder_class("ombria").layout(ombria_source, options=Options(("train/0001",)))
    assert "train/0001" not in layout.splits
