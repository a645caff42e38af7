"""Change-detection sets from fake files in the real formats, in both arrangements: pairs come back in order."""

import fake_bitemporal
import fake_data
import numpy as np
import pytest
import rasterio
from fake_bitemporal import FORMATS, SPLITS, pair, write, write_set
from toy_scenes import found as kinds

from sarjax import raster
from sarjax.data.build import build, builder_class
from sarjax.data.doctor import run
from sarjax.data.layout import Options
from sarjax.data.store import open_dataset, open_directory
from sarjax.data.synthesis import synthesize
from sarjax.errors import UserError

TILE = "/r00000c00000"


def layout(source, config="", options=None):
    return builder_class("bitemporal").layout(source, config, *([options] if options else []))


def texts(found):
    return [(p.severity, p.text) for p in found.problems]


@pytest.fixture
def levir(tmp_path):
    write_set(tmp_path / "levir")
    return tmp_path / "levir"


@pytest.fixture
def flat(tmp_path):
    write_set(tmp_path / "flat", flat=True)
    return tmp_path / "flat"


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("config", "plain"),
    [(c, plain) for c, form in FORMATS.items() for plain in {False, form.folders != fake_bitemporal.PLAIN}],
)
def test_every_set_in_both_arrangements(tmp_path, config, plain, flat):
    pairs = write_set(tmp_path / "s", config, flat, plain)
    said = []
    path = build("bitemporal", tmp_path / "s", tmp_path / "o", config, say=said.append)
    assert path.relative_to(tmp_path / "o").as_posix() == f"bitemporal/{config}/1.0.0"
    assert said == []
    dataset = open_dataset("bitemporal", config, tmp_path / "o")
    assert (dataset.spec.dates, dataset.spec.class_names) == (2, ("unchanged", "changed"))
    (optical,) = dataset.spec.modalities
    names = ["b1", "b2", "b3"] if config == "pairs" else ["red", "green", "blue"]
    assert [b.name for b in optical.bands] == names
    assert (optical.dtype, optical.no_data, {b.radiometry for b in optical.bands}) == ("uint8", None, {"reflectance"})
    assert {split: dataset.split(split).names for split in dataset.splits} == {
        split: tuple(f"{name if flat else f'{split}/{name}'}{TILE}" for name in names)
        for split, names in SPLITS.items()
    }
    for _, name, tile in fake_data.all_tiles(dataset):
        made = pairs[name.removesuffix(TILE)]
        if FORMATS[config].image == ".jpg":
            np.testing.assert_allclose(tile["optical"].astype(int), made.dates, atol=4)
        else:
            np.testing.assert_array_equal(tile["optical"], made.dates)
        assert tile["optical_valid"].all()
        np.testing.assert_array_equal(tile["label"], made.label // 255)


def test_levir_is_the_default_and_dates_are_not_mixed_up(levir, tmp_path):
    write(levir / "train/A/1.png", np.full((256, 256, 3), (10, 20, 30), np.uint8))
    write(levir / "train/B/1.png", np.full((256, 256, 3), (40, 50, 60), np.uint8))
    dataset = open_directory(build("bitemporal", levir, tmp_path / "o"))
    assert dataset.directory.parts[-2] == "levir_cd"
    assert dataset.split("train")[0]["optical"][:, 7, 7].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_a_scene_of_1024_pixels_gives_16_tiles(tmp_path):
    (made,) = write_set(tmp_path / "s", splits={"train": ("1",)}, side=1024).values()
    dataset = open_directory(build("bitemporal", tmp_path / "s", tmp_path / "o"))
    train = dataset.split("train")
    assert train.names == tuple(f"train/1/r{r:05d}c{c:05d}" for r in range(0, 1024, 256) for c in range(0, 1024, 256))
    np.testing.assert_array_equal(train[6]["optical"], made.dates[:, 256:512, 512:768])
    np.testing.assert_array_equal(train[6]["label"], made.label[256:512, 512:768] // 255)


def test_remainders_are_left_out(tmp_path):
    write_set(tmp_path / "s", splits={"train": ("1",)}, side=600)
    assert open_directory(build("bitemporal", tmp_path / "s", tmp_path / "o")).statistics.tiles == {"train": 4}


def test_own_pairs_are_as_their_files_are(tmp_path):
    made = np.random.default_rng(0).integers(1, 4000, (2, 256, 256, 4)).astype(np.uint16)
    for date, image in zip("AB", made, strict=True):
        write(tmp_path / f"s/{date}/1.tif", image)
    write(tmp_path / "s/label/1.png", pair("1").label)
    dataset = open_directory(build("bitemporal", tmp_path / "s", tmp_path / "o", "pairs"))
    (optical,) = dataset.spec.modalities
    assert ([b.name for b in optical.bands], optical.dtype) == (["b1", "b2", "b3", "b4"], "uint16")
    np.testing.assert_array_equal(dataset.split("train")[0]["optical"], made)
    with pytest.raises(UserError, match=r"A/1.tif has 4 bands, but 3 of optical are expected: red, green, blue\."):
        build("bitemporal", tmp_path / "s", tmp_path / "o", "levir_cd")


def test_made_up_scenes(tmp_path):
    source = synthesize(tmp_path / "s", 3, (256, 256), seed=4, dates=2)
    dataset = open_directory(build("bitemporal", source, tmp_path / "o", "synthetic"))
    assert dataset.spec.modality_names == ("sar", "optical")
    assert dataset.spec.modalities == builder_class("whu_opt_sar").spec_of("dates2").modalities
    tiles = fake_data.all_tiles(dataset)
    assert [split for split, _, _ in tiles] == ["train", "val", "test"]
    for _, name, tile in tiles:
        file = f"{name.split('/')[0]}.tif"
        seen = tile["optical_valid"].any(0) | tile["sar_valid"].any(0)
        for sensor in ("sar", "optical"):
            both = np.stack([raster.read(source / folder / file) for folder in (sensor, f"{sensor}_2")])
            np.testing.assert_array_equal(tile[sensor], both)
        change = raster.read(source / "change" / file)[..., 0]
        assert change.any()
        np.testing.assert_array_equal(tile["label"], np.where(seen, change // 255, 255))


def test_made_up_scenes_of_one_date(tmp_path):
    source = synthesize(tmp_path / "s", 3, (256, 256))
    assert texts(layout(source, "synthetic")) == [
        (
            "fatal",
            f"{source} holds sar, optical of the folders sar, sar_2, optical, optical_2 and change, which `sarjax data "
            "synthesize --dates 2` makes: all are expected there.",
        )
    ]


class TestSplits:
    def test_only_some(self, tmp_path):
        write_set(tmp_path / "s", "clcd", splits={"train": ("1", "2"), "test": ("1",)})
        dataset = open_directory(build("bitemporal", tmp_path / "s", tmp_path / "o", "clcd"))
        assert dataset.statistics.tiles == {"train": 2, "test": 1}  # test/1 is another scene than train/1

    def test_none_to_learn_from(self, tmp_path):
        write_set(tmp_path / "s", splits={"test": ("1",)})
        with pytest.raises(UserError, match="the train split of bitemporal is empty"):
            build("bitemporal", tmp_path / "s", tmp_path / "o")

    def test_names_without_ending_and_with_another(self, flat):
        (flat / "list/train.txt").write_text("1\n2.tif\n")
        found = layout(flat)
        assert found.splits == {"1": "train", "2": "train", "3": "val", "4": "test"}
        assert found.problems == ()

    def test_some_lists(self, flat):
        (flat / "list/val.txt").unlink()
        found = layout(flat)
        assert found.splits == {"1": "train", "2": "train", "4": "test"}
        assert texts(found) == [("warning", "1 scene(s) are in no split and left out: 3.")]

    def test_no_lists(self, flat, tmp_path):
        for path in (flat / "list").iterdir():
            path.unlink()
        said = []
        dataset = open_directory(build("bitemporal", flat, tmp_path / "o", say=said.append))
        assert dataset.statistics.tiles == {"train": 2, "val": 1, "test": 1}
        assert said == [
            f"{flat} has no files of splits: in every ten of its 4 scenes by name 7 are train, 1 val, 2 test."
        ]

    def test_an_unknown_name(self, flat):
        (flat / "list/val.txt").write_text("3.png\nnowhere.png\n")
        assert texts(layout(flat)) == [
            ("warning", f"{flat}/list/val.txt lists 1 name(s) that no scene has: nowhere.png.")
        ]

    def test_a_scene_in_two(self, flat, tmp_path):
        (flat / "list/val.txt").write_text("3.png\n1\n")
        with pytest.raises(UserError, match=r"train.txt and .*val.txt both list 1: a scene is in one split"):
            build("bitemporal", flat, tmp_path / "o")

    def test_both_arrangements_at_once(self, levir):
        write_set(levir, flat=True)
        assert texts(layout(levir)) == [
            (
                "fatal",
                f"{levir} holds both A/ and train/A/: folders of all scenes, or folders of each split, are accepted.",
            )
        ]

    def test_scenes_are_left_out_by_name(self, levir, flat):
        assert [s.name for s in layout(levir, options=Options(("train/1.png",))).scenes] == [
            *("train/2", "val/3", "test/4")
        ]
        assert layout(flat, options=Options(("1",))).splits == {"2": "train", "3": "val", "4": "test"}


class TestMissing:
    def test_a_file(self, levir):
        (levir / "train/B/2.png").unlink()
        found = layout(levir)
        assert "train/2" not in found.splits
        assert texts(found) == [("warning", f"{levir}/train/B/2.* is missing: scene train/2 is left out.")]
        assert layout(levir, options=Options(("train/2",))).splits == found.splits

    def test_a_file_twice(self, levir):
        write(levir / "train/A/2.tif", pair("2").before)
        assert texts(layout(levir)) == [
            (
                "warning",
                f"{levir}/train/A/2.png and {levir}/train/A/2.tif are both of scene train/2: it is left out, one of "
                "them is accepted.",
            )
        ]

    @pytest.mark.parametrize("flat", [False, True])
    def test_a_folder(self, tmp_path, flat):
        source = tmp_path / "s"
        write_set(source, "dsifn", flat)
        place = source if flat else source / "val"
        (place / "t2").rename(place / "t3")
        assert texts(layout(source, "dsifn")) == [
            (
                "fatal",
                f"{place} holds t1, mask of the folders t1, t2 and mask, or A, B and label: all are expected there.",
            )
        ]
        (place / "t3").rename(place / "B")  # one date by either name is no pair
        assert [p.kind for p in layout(source, "dsifn").problems] == ["missing"]

    def test_everything(self, tmp_path):
        assert texts(layout(tmp_path)) == [
            (
                "fatal",
                f"{tmp_path} holds none of the folders A, B and label: all are expected there, or in its folders "
                "train, val and test.",
            )
        ]

    def test_all_files(self, levir):
        for path in (levir / "val/A").iterdir():
            path.unlink()
        (fatal,) = (text for severity, text in texts(layout(levir)) if severity == "fatal")
        assert fatal.startswith(f"{levir}/val holds no scene with a file in each of {levir}/val/A, {levir}/val/B, ")

    def test_an_unknown_configuration(self, levir):
        with pytest.raises(UserError, match="unknown configuration of bitemporal 'levir': did you mean 'levir_cd'"):
            layout(levir, "levir")


class TestLabels:
    def test_the_threshold(self, levir, tmp_path):
        label = np.resize(np.arange(256, dtype=np.uint8), (256, 256))
        write(levir / "train/label/1.png", label)
        tile = open_directory(build("bitemporal", levir, tmp_path / "o")).split("train")[0]
        np.testing.assert_array_equal(tile["label"], label >= 128)
        assert tile["label"][0, 126:130].tolist() == [0, 0, 1, 1]

    @pytest.mark.parametrize(("split", "scene"), [("train", "1"), ("train", "2"), ("test", "4")])
    def test_0_and_1_are_refused(self, levir, tmp_path, split, scene):
        """Whichever split it is: all of it would be unchanged."""
        for name in SPLITS[split]:
            write(levir / split / f"label/{name}.png", np.zeros((256, 256), np.uint8))
        write(levir / split / f"label/{scene}.png", pair("x").label // 255)
        with pytest.raises(UserError) as e:
            build("bitemporal", levir, tmp_path / "o")
        assert str(e.value) == (
            f"{levir}/{split}/label/{scene}.png holds no label above 1, and no label in {split} reaches 128, from "
            "which on a pixel is changed: 0 = unchanged and 255 = changed are accepted."
        )
        assert not list(tmp_path.glob("o/*"))

    def test_one_bit_is_0_and_1(self, levir, tmp_path):
        from PIL import Image

        for name in SPLITS["train"]:
            Image.fromarray(pair("x").label > 0).save(levir / f"train/label/{name}.png")
        with pytest.raises(UserError, match=r"label/1.png holds no label above 1, and no label in train reaches 128"):
            build("bitemporal", levir, tmp_path / "o")

    def test_a_scene_in_which_nothing_changed_is_sound(self, levir, tmp_path):
        for split, name in (("train", "1"), ("val", "3")):
            write(levir / split / f"label/{name}.png", np.zeros((256, 256), np.uint8))
        dataset = open_directory(build("bitemporal", levir, tmp_path / "o"))
        assert not dataset.split("train")[0]["label"].any()
        assert not dataset.split("val")[0]["label"].any()

    def test_dsifn_is_also_accepted_with_0_and_1(self, tmp_path):
        pairs = write_set(tmp_path / "s", "dsifn")
        for name in SPLITS["train"]:
            write(tmp_path / f"s/train/mask/{name}.png", pairs[f"train/{name}"].label // 255)
        dataset = open_directory(build("bitemporal", tmp_path / "s", tmp_path / "o", "dsifn"))
        for _, name, tile in fake_data.all_tiles(dataset):
            np.testing.assert_array_equal(tile["label"], pairs[name.removesuffix(TILE)].label // 255)
        write(tmp_path / "s/train/mask/1.png", np.full((256, 256), 7, np.uint8))
        with pytest.raises(UserError, match=r"mask/1.png holds the label 7: labels are 0, 1, 128 to 255\."):
            build("bitemporal", tmp_path / "s", tmp_path / "o2", "dsifn")

    def test_colours_are_no_labels(self, levir, tmp_path):
        write(levir / "train/label/1.png", np.repeat(pair("1").label[..., None], 3, -1))
        with pytest.raises(UserError) as e:
            build("bitemporal", levir, tmp_path / "o")
        assert str(e.value) == (
            f"{levir}/train/label/1.png has 3 bands of uint8: labels are one band of whole numbers."
        )

    def test_more_than_8_bits(self, levir, tmp_path):
        write(levir / "train/label/1.png", pair("1").label.astype(np.uint16) * 257)
        with pytest.raises(UserError, match=r"label/1.png holds the label 65535: labels are 0 to 255\."):
            build("bitemporal", levir, tmp_path / "o")


class TestDoctor:
    def test_sound(self, levir, flat):
        for source in (levir, flat):
            report = run("bitemporal", source)
            assert not report.problems
            assert report.files == 4 * 3
            assert report.tiles == {"train": 2, "val": 1, "test": 1}
        changed = sum(int((pair(f"train/{name}").label > 0).sum()) for name in SPLITS["train"])
        assert run("bitemporal", levir).classes["train"] == (2 * 256**2 - changed, changed)

    def test_made_up_scenes(self, tmp_path):
        report = run("bitemporal", synthesize(tmp_path / "s", 3, (256, 256), seed=4, dates=2), "synthetic")
        assert not report.problems
        assert report.files == 3 * 5

    def test_all_that_is_wrong_at_either_date(self, tmp_path):
        """A build stops at the first of them; the doctor names all, in whichever date's file they are."""
        source = tmp_path / "s"
        write_set(source, "whu_cd", splits={"train": tuple("123456789"), "val": ("1",), "test": ("1",)})
        write(source / "train/B/1.tif", pair("1", 300).after)
        write(source / "train/A/2.tif", pair("2").before[..., :2])
        write(source / "train/B/3.tif", pair("3").after.astype(np.uint16))
        cut = source / "train/B/4.tif"
        cut.write_bytes(cut.read_bytes()[:-300])
        for folder, left in (("A", 0), ("B", 30)):
            place = {"crs": "EPSG:32650", "transform": rasterio.transform.from_origin(left, 0, 10, 10)}
            raster.write(source / f"train/{folder}/5.tif", pair("5").before + np.uint8(left), **place)
        write(source / "train/label/6.tif", pair("6").label.astype(np.uint16) * 2)
        write(source / "train/label/7.tif", np.repeat(pair("7").label[..., None], 3, -1))
        write(source / "train/B/8.tif", pair("train/8").before)
        (source / "train/B/9.tif").unlink()
        write(source / "val/label/1.tif", pair("1").label // 255)
        write(source / "test/A/1.tif", pair("train/1").before)
        write(source / "test/label/1.tif", np.zeros((256, 256), np.uint8))
        report = run("bitemporal", source, "whu_cd")
        assert [(p.severity, p.kind, p.where.removeprefix(f"{source}/")) for p in report.problems] == [
            ("fatal", "unreadable", "train/B/4.tif"),
            ("fatal", "size", "train/B/1.tif"),
            ("fatal", "bands", "train/A/2.tif"),
            ("fatal", "bands", "train/label/7.tif"),
            ("fatal", "dtype", "train/B/3.tif"),
            ("fatal", "georeference", "train/B/5.tif"),
            ("fatal", "labels", "train/label/6.tif"),
            ("fatal", "labels", "val/label/1.tif"),
            ("warning", "missing", "train/B/9.*"),
            ("warning", "duplicate", "test/1"),
            ("warning", "duplicate", "train/8"),
            ("warning", "absent class", "test"),
            ("warning", "absent class", "val"),
        ]
        said = {p.where: p.text for p in report.problems}
        assert said["train/8"] == (
            "The optical images of dates 1 and 2 of train/8 are one and the same: nothing can have changed between "
            "them, images of two dates are expected."
        )
        assert said[f"{source}/val/label/1.tif"].endswith("0 = unchanged and 255 = changed are accepted.")
        assert said[f"{source}/train/label/6.tif"].endswith("which stand for no class: labels are 0 to 255.")
        assert report.unknown == {f"{source}/train/label/6.tif": {510: int((pair("6").label > 0).sum())}}
        assert all(len(text.split(". ")) == 1 for text in said.values())

    def test_lists(self, flat):
        (flat / "list/val.txt").write_text("2\n3\nnowhere\n")
        (flat / "list/test.txt").unlink()
        report = run("bitemporal", flat)
        assert kinds(report) == [("split", "2"), ("split", "flat"), ("split", "val.txt")]
        assert [p.severity for p in report.problems] == ["fatal", "warning", "warning"]

    @pytest.mark.parametrize("damage", ["size", "labels"])
    def test_a_build_stops_where_the_doctor_does(self, levir, tmp_path, damage):
        if damage == "size":
            write(levir / "train/B/2.png", pair("2", 257).after)
        else:
            write(levir / "test/label/4.png", pair("4").label // 255)
        (fatal,) = (p.text for p in run("bitemporal", levir).problems if p.severity == "fatal")
        with pytest.raises(UserError) as e:
            build("bitemporal", levir, tmp_path / "o")
        assert str(e.value) == fatal
