"""A folder of one's own: files in several formats and dtypes come back equal."""

import fake_data
import numpy as np
import pytest
import rasterio
from fake_folder import CLASSES, OWN, RNG, SEN1FLOODS11, image, indices, write, write_own

from sarjax.data import doctor
from sarjax.data.build import build, builder_class
from sarjax.data.layout import Options
from sarjax.data.store import open_dataset, open_directory


def layout(source, config="", options=None):
    return builder_class("paired_folder").layout(source, config, *([options] if options else []))


@pytest.mark.parametrize(("dtype", "stored"), [("uint8",) * 2, ("uint16",) * 2, ("float32",) * 2, ("int16", "float32")])
def test_what_is_stored_is_what_was_in_the_files(tmp_path, dtype, stored):
    made = write_own(tmp_path / "s", ["a", "b", "c"], bands=5, dtype=dtype, size=(130, 64))
    said = []
    path = build("paired_folder", tmp_path / "s", tmp_path / "o", say=said.append)
    assert path == tmp_path / "o" / "paired_folder" / "own" / "1.0.0"
    assert said == [
        f"{tmp_path / 's'} has no files of splits: in every ten of its 3 scenes by name 7 are train, 1 val, 2 test."
    ]
    dataset = open_dataset("paired_folder", "own", tmp_path / "o")
    (sar,) = dataset.spec.modalities
    assert (sar.dtype, [b.name for b in sar.bands]) == (stored, ["b1", "b2", "b3", "b4", "b5"])
    tiles = fake_data.all_tiles(dataset)
    assert [(split, name) for split, name, _ in tiles] == [
        (split, f"{scene}/r{row:05d}c00000")
        for split, scene in (("train", "a"), ("val", "b"), ("test", "c"))
        for row in (0, 64)
    ]
    for _, name, tile in tiles:
        row = int(name[3:8])
        whole, label = made[name[0]]
        np.testing.assert_array_equal(tile["sar"][0], whole[row : row + 64])
        np.testing.assert_array_equal(tile["label"], indices(label[row : row + 64]))
        assert tile["sar_valid"].all()


def test_a_nan_in_any_band_is_no_data(tmp_path):
    made = write_own(tmp_path / "s", ["a"])
    sar, _ = made["a"]
    sar[3, 4, 1] = np.nan
    fake_data.write_tiff(tmp_path / "s/sar/a.tif", sar)
    tile = open_directory(build("paired_folder", tmp_path / "s", tmp_path / "o")).split("train")[0]
    assert np.argwhere(tile["sar_valid"] == 0).tolist() == [[0, 3, 4]]
    assert tile["sar"][0, 3, 4].tolist() == [0, 0]
    assert tile["label"][3, 4] == 255
    assert not np.isnan(tile["sar"]).any()


def test_two_sensors_two_dates_sub_folders_and_suffixes(tmp_path):
    source, made = tmp_path / "s", {}
    for name in ("north/1", "north/2", "south/1"):
        for key, path, bands in (
            ("sar0", f"before/S1/{name}_S1.tif", 1),
            ("sar1", f"after/S1/{name}_S1.tif", 1),
            ("optical0", f"before/S2/{name}.png", 3),
            ("optical1", f"after/S2/{name}.jpg", 3),
        ):
            made[name, key] = array = image(bands)
            write(source / path, array)
        made[name, "label"] = label = RNG.choice([0, 1, 7], (64, 64, 1)).astype(np.uint8)
        write(source / f"masks/{name}_mask.png", label)
    (source / "masks" / "north" / "._1_mask.png").write_bytes(b"")
    (source / "masks" / "north" / "notes.txt").write_text("of no interest")
    (source / "dataset.toml").write_text(f"""
name = "two-dates"
tile = 64
[sar]
folder = ["before/S1", "after/S1"]
suffix = "_S1"
radiometry = "amplitude"
[optical]
folder = ["before/S2", "after/S2"]
bands = ["red", "green", "blue"]
dtype = "uint8"
[label]
folder = "masks"
suffix = "_mask"
{CLASSES}
""")
    said = []
    dataset = open_directory(build("paired_folder", source, tmp_path / "o", say=said.append))
    assert len(said) == 1  # how scenes are split
    assert dataset.spec.dates == 2
    assert [b.name for b in dataset.spec.modality("optical").bands] == ["red", "green", "blue"]
    for _, name, tile in fake_data.all_tiles(dataset):
        scene = name.rsplit("/", 1)[0]
        for date in (0, 1):
            np.testing.assert_array_equal(tile["sar"][date], made[scene, f"sar{date}"])
        np.testing.assert_array_equal(tile["optical"][0], made[scene, "optical0"])
        assert np.abs(tile["optical"][1].astype(int) - made[scene, "optical1"]).mean() < 60  # a JPEG of noise
        np.testing.assert_array_equal(tile["label"], made[scene, "label"][..., 0] == 1)


def test_optical_alone(tmp_path):
    for name in "ab":
        write(tmp_path / f"s/optical/{name}.png", image(3))
        write(tmp_path / f"s/label/{name}.png", np.ones((64, 64, 1), np.uint8))
    (tmp_path / "s/dataset.toml").write_text(f'name = "o"\ntile = 32\n{CLASSES}')
    said = []
    dataset = open_directory(build("paired_folder", tmp_path / "s", tmp_path / "o", say=said.append))
    assert dataset.spec.modality_names == ("optical",)
    assert dataset.statistics.tiles == {"train": 8}
    assert said == [f"{tmp_path / 's'} has no files of splits: all of its 2 scene(s) are training data."]


def test_transforms_are_done_and_declared(tmp_path):
    toml = OWN.replace(
        'radiometry = "intensity"', 'radiometry = "db"\ntransforms = [{ name = "db", quantity = "intensity" }]'
    )
    made = write_own(tmp_path / "s", ["a"], dtype="uint16", toml=toml)
    dataset = open_directory(build("paired_folder", tmp_path / "s", tmp_path / "o"))
    tile = dataset.split("train")[0]
    np.testing.assert_allclose(tile["sar"][0], 10 * np.log10(made["a"][0]), rtol=1e-5)
    (sar,) = dataset.spec.modalities
    assert (sar.dtype, sar.transforms[0].name) == ("float32", "db")


@pytest.mark.parametrize(
    ("config", "sar", "optical", "label", "lists"),
    [
        (
            "ddhr_sk",
            "korea/GF3/{}.jpg",
            "korea/GF2/{}.jpg",
            "korea/label/{}.png",
            ("korea/train.txt", "korea/val.txt"),
        ),
        ("pie_rgb_sar", "sar/{}.tif", "rgb/{}.tif", "label/{}.tif", ("train.txt", "val.txt")),
        ("yeseg_opt_sar", "sar/{}.png", "optical/{}.png", "label/{}.png", ()),
    ],
)
def test_published_sets(tmp_path, config, sar, optical, label, lists):
    source = tmp_path / "s"
    names = ["7/1", "7/2", "HY_C/1"] if config == "yeseg_opt_sar" else ["1", "20", "3"]
    for name in names:
        for path, bands in ((sar, 1), (optical, 3), (label, 1)):
            path = source / path.format(name)
            labels = RNG.integers(0, 5, (256, 256, 1), dtype=np.uint8)
            write(path, labels if "label" in path.parts else image(bands, size=(256, 256)))
    for file, text in zip(lists, (f"{names[0]}\n{names[1]}\n", names[2]), strict=False):
        (source / file).write_text(text)
    dataset = open_directory(build("paired_folder", source, tmp_path / "o", config))
    assert dataset.directory.parts[-2] == config == dataset.spec.name
    assert dataset.statistics.tiles == ({"train": 2, "test": 1} if lists else {"train": 1, "val": 1, "test": 1})
    assert [len(m.bands) for m in dataset.spec.modalities] == [1, 3]
    assert dataset.spec.modality("sar").bands[0].radiometry == "stretched"
    # What the user says comes before what is built in.
    (source / "dataset.toml").write_text('tile = 128\nexcluded = ["water"]\n[sar]\nbands = ["HH"]\n')
    found = layout(source, config)
    assert (found.tile, found.spec.excluded, found.spec.modality("sar").bands[0].name) == (128, ("water",), "HH")
    assert found.spec.num_classes == dataset.spec.num_classes


@pytest.mark.parametrize("optical", [False, True])
def test_a_real_chip(shared_data, tmp_path, optical):
    """Sen1Floods11 by the README's description, which lies outside of the read-only folder."""
    toml = tmp_path / "sen1floods11.toml"
    toml.write_text(SEN1FLOODS11)
    if optical:
        toml.write_text(f'{toml.read_text()}\n[optical]\nfolder = "S2"\nsuffix = "_S2Hand"\n')
    source = shared_data / "sen1floods11"
    path = build("paired_folder", source, tmp_path / "o", options=Options(description=toml), jobs=2)
    dataset = open_directory(path)
    with rasterio.open(source / "S1/Spain_7370579_S1Hand.tif") as f:
        sar = np.moveaxis(f.read(), 0, -1)
    with rasterio.open(source / "Labels/Spain_7370579_LabelHand.tif") as f:
        label = f.read(1)
    tiles = dataset.split("train")
    assert tiles.names[-1] == "Spain_7370579/r00256c00256"
    whole = {
        key: np.concatenate(
            [np.concatenate([tiles[2 * r + c][key] for c in (0, 1)], -1 - last) for r in (0, 1)], -2 - last
        )
        for key, last in (("label", 0), ("sar", 1), ("sar_valid", 0))
    }
    seen = np.isfinite(sar).all(-1)
    np.testing.assert_array_equal(whole["sar_valid"][0], seen)
    np.testing.assert_array_equal(whole["sar"][0], np.where(seen[..., None], sar, 0))
    known = seen if not optical else np.ones_like(seen)
    np.testing.assert_array_equal(whole["label"][known], np.where(label == -1, 255, label)[known])
    assert dataset.spec.modality_names == (("sar", "optical") if optical else ("sar",))
    if optical:
        assert tiles[0]["optical"].shape == (1, 256, 256, 13)
        assert tiles[0]["optical"].dtype == np.float32
    mean = dataset.statistics.bands["sar"].mean
    np.testing.assert_allclose(mean, sar[seen].astype(np.float64).mean(0), rtol=1e-6)
    assert mean[0] > mean[1]  # VV is brighter than VH


def test_a_folder_without_labels(tmp_path):
    """For what learns from unlabelled tiles; said in the description, so that a folder's wrong name is no such set."""
    made = write_own(tmp_path / "s", ["a", "b", "c"], toml=OWN + '[label]\nfolder = ""\n')
    for path in (tmp_path / "s" / "label").iterdir():
        path.unlink()
    (tmp_path / "s" / "label").rmdir()
    report = doctor.run("paired_folder", tmp_path / "s")
    assert not report.problems
    assert report.files == 3
    dataset = open_directory(build("paired_folder", tmp_path / "s", tmp_path / "o", jobs=2))
    assert dataset.statistics.class_pixels == (0, 0)
    for _, name, tile in fake_data.all_tiles(dataset):
        np.testing.assert_array_equal(tile["sar"][0], made[name[0]][0])
        assert (tile["label"] == 255).all()
    (tmp_path / "s" / "dataset.toml").write_text(OWN)
    assert [p.kind for p in layout(tmp_path / "s").problems] == ["missing"]


def test_what_is_left_open_comes_from_the_first_file_that_can_be_read(tmp_path):
    """Else one empty file would make all others wrong."""
    write_own(tmp_path / "s", ["a", "b", "c"], bands=3, dtype="uint16")
    (tmp_path / "s" / "sar" / "a.tif").write_bytes(b"")
    (modality,) = layout(tmp_path / "s").spec.modalities
    assert (len(modality.bands), modality.dtype) == (3, "uint16")
    (problem,) = (p for p in doctor.run("paired_folder", tmp_path / "s").problems if p.severity == "fatal")
    assert (problem.kind, problem.where) == ("unreadable", str(tmp_path / "s" / "sar" / "a.tif"))
