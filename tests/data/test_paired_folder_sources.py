"""Folders of one's own that are odd, incomplete or wrong, their lists of splits, and several descriptions of one."""

import warnings

import numpy as np
import pytest
import rasterio
from fake_folder import OWN, image, write, write_own
from rasterio.errors import NotGeoreferencedWarning

from sarjax.data.build import build, builder_class
from sarjax.data.layout import Options
from sarjax.data.store import open_dataset, open_directory
from sarjax.errors import UserError


@pytest.fixture
def own(tmp_path):
    write_own(tmp_path / "own", ["a", "b", "c"])
    return tmp_path / "own"


def layout(source, config="", options=None):
    return builder_class("paired_folder").layout(source, config, *([options] if options else []))


def texts(found):
    return [(p.severity, p.text) for p in found.problems]


class TestSplits:
    @pytest.mark.parametrize(
        ("lists", "wanted"),
        [
            ({"train": "a\n\n# all of the rest\nb.tif\n", "val": "c.tif"}, {"a": "train", "b": "train", "c": "val"}),
            ({"train": "a\nb", "test": "c"}, {"a": "train", "b": "train", "c": "test"}),
        ],
    )
    def test_lists(self, own, lists, wanted):
        (own / "split").mkdir()
        for split, text in lists.items():
            (own / f"split/{split}.txt").write_text(text)
        found = layout(own)
        assert found.splits == wanted
        assert found.problems == ()
        assert found.notice == ""

    def test_names_of_files_with_a_suffix(self, tmp_path):
        write_own(
            tmp_path / "s",
            ["a_S1", "b_S1"],
            toml=OWN.replace("[sar]", '[label]\nsuffix = "_S1"\n[sar]\nsuffix = "_S1"'),
        )
        (tmp_path / "s/split").mkdir()
        (tmp_path / "s/split/train.txt").write_text("a_S1.tif\nb")
        assert layout(tmp_path / "s").splits == {"a": "train", "b": "train"}

    def test_what_is_odd_is_said(self, own):
        (own / "split").mkdir()
        (own / "split/train.txt").write_text("a\na.tif\nnowhere\n")
        found = layout(own)
        assert found.splits == {"a": "train"}
        assert texts(found) == [
            ("warning", f"{own}/split/train.txt lists a.tif twice: once is enough."),
            ("warning", f"{own}/split/train.txt lists 1 name(s) that no scene has: nowhere."),
            ("warning", "2 scene(s) are in no split and left out: b, c."),
        ]

    def test_what_is_in_no_split_is_not_looked_at(self, own, tmp_path):
        (own / "split").mkdir()
        (own / "split/train.txt").write_text("b\nc")
        (own / "label/a.tif").write_bytes(b"")
        dataset = open_directory(build("paired_folder", own, tmp_path / "o"))
        assert [int(tile["id"]) for tile in dataset.split("train")] == [0, 1]

    def test_a_scene_in_two_splits(self, own, tmp_path):
        (own / "split").mkdir()
        (own / "split/train.txt").write_text("a\nb")
        (own / "split/test.txt").write_text("c\nb.tif")
        with pytest.raises(UserError, match=r"train.txt and .*test.txt both list b: a scene is in one split"):
            build("paired_folder", own, tmp_path / "o")

    def test_a_list_that_is_named_must_be_there(self, own):
        (own / "dataset.toml").write_text(f'{OWN}\n[split]\ntrain = "lists/train.txt"')
        assert texts(layout(own)) == [
            ("fatal", f"{own}/lists/train.txt is missing: the description says that it lists the scenes of a split.")
        ]

    def test_nothing_to_train_on(self, own, tmp_path):
        (own / "split").mkdir()
        (own / "split/test.txt").write_text("a\nb\nc")
        with pytest.raises(UserError, match="the train split of own is empty: add training data"):
            build("paired_folder", own, tmp_path / "o")

    def test_a_scene_that_is_left_out_may_be_listed(self, own):
        (own / "split").mkdir()
        (own / "split/train.txt").write_text("a\nb\nc")
        found = layout(own, options=Options(("b.tif",)))
        assert found.splits == {"a": "train", "c": "train"}
        assert found.problems == ()


class TestBadSources:
    def test_an_incomplete_scene_is_left_out(self, own, tmp_path):
        (own / "label/b.tif").unlink()
        said = []
        build("paired_folder", own, tmp_path / "o", say=said.append)
        assert f"{own}/label/b.* is missing: scene b is left out." in said

    def test_an_incomplete_scene_that_is_listed_is_mentioned_once(self, own):
        (own / "label/b.tif").unlink()
        (own / "split").mkdir()
        (own / "split/train.txt").write_text("a\nb\nc")
        found = layout(own)
        assert found.splits == {"a": "train", "c": "train"}
        assert texts(found) == [("warning", f"{own}/label/b.* is missing: scene b is left out.")]

    @pytest.mark.parametrize("name", ["b", "b.tif"])
    def test_an_incomplete_scene_may_be_left_out(self, own, name):
        (own / "label/b.tif").unlink()
        assert [s.name for s in layout(own, options=Options((name,))).scenes] == ["a", "c"]
        write(own / "sar/c.png", image(1))
        assert [s.name for s in layout(own, options=Options((name, "c"))).scenes] == ["a"]

    def test_many_incomplete_scenes_are_counted(self, tmp_path):
        write_own(tmp_path / "s", [f"{i:03d}" for i in range(20)])
        for i in range(15):
            (tmp_path / f"s/label/{i:03d}.tif").unlink()
        said = []
        build("paired_folder", tmp_path / "s", tmp_path / "o", say=said.append)
        assert len(said) == 12
        assert said[-1] == "and 5 more warnings, which `sarjax data check` shows."

    def test_two_files_of_one_scene(self, own):
        write(own / "sar/b.png", image(1))
        found = layout(own)
        assert [s.name for s in found.scenes] == ["a", "c"]
        assert texts(found) == [
            (
                "warning",
                f"{own}/sar/b.png and {own}/sar/b.tif are both of scene b: it is left out, one of them is accepted.",
            )
        ]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda s: [p.unlink() for p in (s / "sar").iterdir()],
                "no scene with a file in each of .*/label, .*/sar",
            ),
            (lambda s: (s / "sar").rename(s / "SAR"), "sar is missing: the description says that files are there"),
            (lambda s: write(s / "sar/b.tif", image(3, "float32")), "b.tif has 3 bands, but 2 of sar"),
            (
                lambda s: write(s / "sar/b.tif", image(2)),
                "b.tif holds uint8, but float32 is expected",
            ),
            (
                lambda s: write(s / "sar/a.tif", image(2, "float64")),
                "a.tif does not fit: float64",
            ),
            (lambda s: (s / "sar/a.tif").write_bytes(b"x" * 99), "a.tif cannot be read"),
            (
                lambda s: write(s / "label/b.tif", image(1, "float32")),
                "one band of whole numbers",
            ),
            (
                lambda s: write(s / "label/a.tif", np.full((64, 64), 9, np.uint8)),
                "a.tif holds the label 9",
            ),
            (lambda s: write_own(s, "ab", size=(63, 64)), "is 64 x 63 pixels, smaller than a tile of 64"),
            (
                lambda s: (s / "dataset.toml").write_text(OWN.replace('"intensity"', '["db", "db", "db"]')),
                "sar. has 3 radiometries for 2 bands",
            ),
        ],
    )
    def test_a_bad_source_is_named(self, own, tmp_path, damage, message):
        damage(own)
        with pytest.raises(UserError, match=message) as e:
            build("paired_folder", own, tmp_path / "o")
        assert len(str(e.value).splitlines()) == 1
        assert not list(tmp_path.glob("o/*"))

    def test_files_that_lie_elsewhere_on_the_ground(self, own, tmp_path):
        for folder, left in (("sar", 0.0), ("label", 20.0)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(own / folder / "b.tif") as f:
                    array, profile = f.read(), f.profile
            profile |= {"crs": "EPSG:32650", "transform": rasterio.transform.from_origin(left, 0, 10, 10)}
            with rasterio.open(own / folder / "b.tif", "w", **profile) as f:
                f.write(array)
        with pytest.raises(UserError, match=r"label/b.tif lies 2.0 pixels away from .*sar/b.tif: resample"):
            build("paired_folder", own, tmp_path / "o")

    def test_no_description(self, tmp_path):
        (tmp_path / "s/sar").mkdir(parents=True)
        with pytest.raises(UserError, match=r"dataset.toml is missing: .*--description FILE, or --config with"):
            build("paired_folder", tmp_path / "s", tmp_path / "o")

    def test_another_name(self, own, tmp_path):
        with pytest.raises(UserError, match="unknown configuration of paired_folder 'onw': did you mean 'own'"):
            build("paired_folder", own, tmp_path / "o", "onw")
        assert build("paired_folder", own, tmp_path / "o", "own").parts[-2] == "own"


class TestDescriptions:
    def test_the_name_of_a_built_in_one(self, own):
        (own / "dataset.toml").write_text(OWN.replace('"own"', '"ddhr_sk"'))
        message = "name in .*dataset.toml.* is 'ddhr_sk', as a built-in .* than ddhr_sk, pie_rgb_sar, yeseg_opt_sar"
        for config in ("", "pie_rgb_sar"):
            with pytest.raises(UserError, match=message):
                layout(own, config)
        for name in ("ddhr_sk", "mine"):
            (own / "dataset.toml").write_text(f'name = "{name}"\n[sar]\nfolder = "sar"\n[optical]\nfolder = "sar"')
            assert layout(own, "ddhr_sk").spec.name == name

    def test_two_descriptions_of_one_folder(self, own, tmp_path):
        other = tmp_path / "other.toml"
        other.write_text(OWN.replace('"own"', '"other"').replace("tile = 64", "tile = 32"))

        def second(stage, done, total):
            if stage == "train" and done == 0:
                build("paired_folder", own, tmp_path / "o", options=Options(description=other))

        build("paired_folder", own, tmp_path / "o", progress=second)
        tiles = [
            open_dataset("paired_folder", name, tmp_path / "o").statistics.tiles["train"] for name in ("own", "other")
        ]
        assert tiles == [1, 4]
        with pytest.raises(UserError, match=r"no data set 'paired_folder' in .* where there is paired_folder/other, "):
            open_dataset("paired_folder", data_dir=tmp_path / "o")
        assert sorted(p.name for p in (tmp_path / "o/paired_folder").iterdir()) == ["other", "own"]

    def test_another_description_of_that_name(self, own, tmp_path):
        build("paired_folder", own, tmp_path / "o")
        (own / "dataset.toml").write_text(OWN.replace('"wet"', '"water"'))
        with pytest.raises(UserError, match=r"holds other records .*\(other bands, classes or no-data values\)"):
            build("paired_folder", own, tmp_path / "o")
        build("paired_folder", own, tmp_path / "o", overwrite=True)
        assert open_dataset("paired_folder", "own", tmp_path / "o").spec.class_names == ("dry", "water")
