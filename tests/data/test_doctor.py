"""The doctor: every problem at once, exact counts, whatever the tiles."""

import dataclasses
import json
import tracemalloc

import fake_data
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from toy_scenes import GAP, LABELS, SPEC, TILE, Toy, found, histogram, only

from sarjax.data import tally
from sarjax.data.doctor import KINDS, SHOWN, check, render, to_dict
from sarjax.data.layout import Problem
from sarjax.spec import BandSpec, Transform


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path / "scenes")


class TestCounts:
    def test_a_sound_source_has_no_problem(self, toy):
        report = check(toy.layout())
        assert not report.problems
        assert not report.fatal
        assert report.exit_code == 0
        assert report.files == 12
        assert report.scenes == {"train": 2, "val": 1, "test": 1}
        assert list(report.scenes) == ["train", "val", "test"]
        assert report.tiles == {"train": 24, "val": 12, "test": 12}
        for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
            counts = histogram(toy.arrays[name]["label"] for name in names)
            assert (report.classes[split], report.ignored[split]) == counts
        assert report.no_data == {"sar": 0, "optical": 0}
        assert not report.unknown
        assert not report.empty_tiles

    def test_remainders_are_tiles_only_where_all_is_covered(self, toy):
        assert check(toy.layout(cover=True)).tiles == {"train": 40, "val": 20, "test": 20}

    def test_what_is_in_no_split_is_not_read(self, toy):
        toy.path("sar", "b").write_bytes(b"")
        splits = {"a": "train", "c": "val", "d": "test"}
        report = check(toy.layout(splits=splits))
        assert not report.problems
        assert report.scenes == {"train": 1, "val": 1, "test": 1}
        assert report.files == 9

    def test_tiles_drawn_at_random_are_of_no_split(self, toy):
        report = check(toy.layout(random=True, splits={}))
        assert not report.problems
        assert report.scenes == {"all": 4}
        assert report.classes["all"] == histogram(a["label"] for a in toy.arrays.values())[0]

    def test_progress_is_told(self, toy):
        said = []
        check(toy.layout(), lambda *args: said.append(args))
        assert said == [("check", i, 4) for i in range(5)]

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(data=st.data())
    def test_counts_are_those_of_whole_arrays(self, tmp_path_factory, data):
        """However the files are cut into windows and tiles, and in whatever order scenes come."""
        w, h = (data.draw(st.integers(TILE, 110)) for _ in range(2))
        tile, cover = data.draw(st.sampled_from([TILE, 17, 24])), data.draw(st.booleans())
        toy = Toy(tmp_path_factory.mktemp("toy"), size=(w, h))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        for name in toy.names:
            for kind in ("sar", "optical"):
                image = toy.arrays[name][kind]
                image[fake_data.blocks(rng, (h, w), 2, 1).astype(bool) & (rng.random((h, w)) < 0.4)] = 0
                image[h // 4 :, : w * 2 // 3] = 0
                toy.write(kind, name)
        order = data.draw(st.permutations(range(4)))
        values = data.draw(st.sampled_from([1, 5000, 2**23]))
        layout = toy.layout(tile=tile, cover=cover)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tally, "WINDOW_VALUES", values)
            report = check(dataclasses.replace(layout, scenes=tuple(layout.scenes[i] for i in order)))
        empty, invalid, blank = {}, {"sar": 0, "optical": 0}, []
        for name in toy.names:
            dark = toy.arrays[name]["sar"] == 0
            regions, n = ndimage.label(dark, np.ones((3, 3)))
            sizes = ndimage.sum_labels(dark, regions, range(n + 1))
            no_sar = dark & (sizes[regions] >= GAP)
            no_optical = ~toy.arrays[name]["optical"].any(-1)
            invalid["sar"] += no_sar.sum()
            invalid["optical"] += no_optical.sum()
            blind = no_sar & no_optical
            for kind, missing in (("sar", no_sar), ("optical", no_optical)):
                blank += [str(toy.path(kind, name))] if 2 * missing.sum() > missing.size else []
            rows, columns = (
                [*range(0, n - tile + 1, tile)] + ([n - tile] if cover and n % tile else []) for n in (h, w)
            )
            tiles = sum(blind[r : r + tile, c : c + tile].all() for r in rows for c in columns)
            if tiles:
                empty[name] = tiles
            assert report.tiles["train"] == 2 * len(rows) * len(columns)
        assert report.empty_tiles == empty
        assert [p.where for p in report.problems if p.kind == "no-data"] == sorted([*empty, *blank])
        for modality, pixels in invalid.items():
            assert report.no_data[modality] == pytest.approx(pixels / (4 * w * h), abs=1e-12)
        for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
            counts = histogram(toy.arrays[name]["label"] for name in names)
            assert (report.classes[split], report.ignored[split]) == counts
        assert json.dumps(to_dict(report)) == json.dumps(to_dict(check(layout)))

    @pytest.mark.parametrize("axis", [0, 1])
    def test_memory_does_not_grow_with_a_scene(self, tmp_path, monkeypatch, axis):
        monkeypatch.setattr(tally, "WINDOW_VALUES", 2**17)
        peaks = []
        for factor in (1, 8):
            toy = Toy(tmp_path / str(factor), names=("a",), size=(256, 1024 * factor)[:: 1 - 2 * axis])
            layout = toy.layout()
            toy.arrays.clear()
            tracemalloc.start()
            assert not found(check(layout), "unreadable")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.3 * peaks[0]


class TestLabels:
    @pytest.mark.parametrize(
        ("dtype", "value"), [(np.uint8, 77), (np.uint16, 65535), (np.int16, 77), (np.uint32, 4_000_000_000)]
    )
    def test_unknown_values_are_counted(self, toy, dtype, value):
        label = toy.arrays["a"]["label"].astype(dtype)
        label[50:60, 50:57] = 35
        label[129, 99] = value
        path = toy.write("label", "a", label)
        report = check(toy.layout())
        problem = only(report)
        assert (problem.severity, problem.kind, problem.where) == ("fatal", "labels", str(path))
        assert report.unknown == {str(path): {35: 70, value: 1}}
        assert f"35 (70 pixels, 0.538%), {value} (1 pixels, 0.008%)" in problem.text
        assert "labels are 0, 10, 20, 30." in problem.text
        counts = histogram([label, toy.arrays["b"]["label"]])
        assert (report.classes["train"], report.ignored["train"]) == counts

    def test_negative_values(self, toy):
        label = toy.arrays["a"]["label"].astype(np.int16)
        label[0, 0] = -1
        path = toy.write("label", "a", label)
        assert check(toy.layout()).unknown == {str(path): {-1: 1}}
        assert not check(toy.layout(labels=LABELS | {-1: 255})).problems

    def test_many_unknown_values_are_shortened(self, toy):
        label = toy.arrays["a"]["label"]
        label[:2, :50] = 100 + np.arange(100).reshape(2, 50)
        toy.write("label", "a")
        report = check(toy.layout())
        assert "109 (1 pixels, 0.008%) and 90 more values, " in only(report).text
        assert len(report.unknown[str(toy.path("label", "a"))]) == 100

    def test_absent_classes(self, toy):
        for name, value in (("a", 20), ("b", 20), ("c", 30)):
            label = toy.arrays[name]["label"]
            label[label == value] = 10
            toy.write("label", name)
        report = check(toy.layout())
        assert [(p.severity, p.kind, p.where) for p in report.problems] == [
            ("warning", "absent class", "train"),
            ("warning", "absent class", "val"),
        ]
        assert "town has no pixel in train: it cannot be learned" in report.problems[0].text
        assert "water has no pixel in val: it cannot be measured" in report.problems[1].text
        assert report.exit_code == 0
        assert not found(check(toy.layout(random=True)))

    def test_a_class_that_may_hide_in_a_broken_label(self, toy):
        label = toy.arrays["a"]["label"]
        label[label == 20] = 10
        toy.write("label", "a")
        for name in "bc":
            toy.path("label", name).write_bytes(b"")
        absent = [p for p in check(toy.layout()).problems if p.kind == "absent class"]
        assert [p.where for p in absent] == ["train"]  # nothing is known of val, and why is said already
        assert "labels of 1 scenes could not be read" in absent[0].text


class TestNoData:
    def test_tiles_that_no_sensor_saw(self, toy):
        for kind in ("sar", "optical"):
            toy.arrays["a"][kind][TILE : 2 * TILE, : 2 * TILE] = 0
        toy.arrays["b"]["sar"][:TILE, :TILE] = 0  # the optical image sees it
        for name in "ab":
            for kind in ("sar", "optical"):
                toy.write(kind, name)
        report = check(toy.layout())
        problem = only(report)
        assert (problem.severity, problem.kind, problem.where) == ("warning", "no-data", "a")
        assert problem.text.startswith("2 of 12 tiles of a ")
        assert report.empty_tiles == {"a": 2}
        assert report.no_data["optical"] == pytest.approx(2 * TILE**2 / (4 * 13000))
        assert report.no_data["sar"] == pytest.approx(3 * TILE**2 / (4 * 13000))

    def test_one_pixel_in_a_corner_is_seen(self, toy):
        for kind in ("sar", "optical"):
            toy.arrays["a"][kind][:TILE, : 3 * TILE] = 0
        toy.arrays["a"]["optical"][TILE - 1, 0] = toy.arrays["a"]["optical"][0, 2 * TILE - 1] = 9
        for kind in ("sar", "optical"):
            toy.write(kind, "a")
        assert check(toy.layout()).empty_tiles == {"a": 1}

    def test_an_image_that_saw_little(self, toy):
        toy.arrays["b"]["sar"][:65] = 0  # half of it, which may be the border of a pass
        toy.arrays["c"]["sar"][:65] = 0
        toy.arrays["c"]["sar"][80, :GAP] = 0
        for name in "bc":
            toy.write("sar", name)
        problem = only(check(toy.layout()))
        assert (problem.severity, problem.kind, problem.where) == ("warning", "no-data", str(toy.path("sar", "c")))
        assert problem.text == f"{problem.where} holds no data in 50.06 % of its pixels."

    def test_decibels_of_decibels(self, toy):
        """The logarithm of a negative number is none: but for a few bright pixels nothing is left."""
        decibels = -np.ones((130, 100), np.float32)
        decibels[0, 99] = decibels[70, 5] = decibels[70, 6] = 2
        spec = SPEC.modality("sar")
        twice = dataclasses.replace(
            spec,
            bands=(BandSpec("VV", "db"),),
            dtype="float32",
            no_data=None,
            smallest_gap=1,
            transforms=(Transform("db", "intensity"),),
        )
        for name in toy.names:
            toy.write("sar", name, decibels)
        layout = toy.layout(splits=dict.fromkeys(toy.names, "train"))
        layout = dataclasses.replace(layout, spec=dataclasses.replace(SPEC, modalities=(twice, SPEC.modalities[1])))
        problems = check(layout).problems
        assert [(p.kind, p.where) for p in problems] == [("no-data", str(toy.path("sar", n))) for n in toy.names]
        assert all("holds no data in 99.97 % of its pixels" in p.text for p in problems)

    def test_an_image_that_saw_nothing(self, toy):
        toy.write("sar", "a", np.zeros((130, 100), np.uint8))
        assert found(check(toy.layout())) == [("no-data", "a.tif")]
        toy.write("optical", "a", np.zeros((130, 100, 2), np.uint8))
        assert found(check(toy.layout())) == [("no-data", "a")]  # said once of the scene


class TestDuplicates:
    def test_two_dates_that_are_one(self, toy):
        """A copy is said; a file that is given for both dates is meant so."""
        toy.write("optical", "a").rename(toy.folder / "later.tif")
        toy.write("optical", "a")
        (scene,) = (s for s in toy.layout().scenes if s.name == "a")
        sar, optical = (scene.images[m][0] for m in ("sar", "optical"))
        images = {"sar": (sar, sar), "optical": (optical, toy.folder / "later.tif")}
        spec = dataclasses.replace(SPEC, dates=2)
        layout = toy.layout(scenes=(scene._replace(images=images),), splits={"a": "train"})
        problem = only(check(dataclasses.replace(layout, spec=spec)))
        assert (problem.severity, problem.kind, problem.where) == ("warning", "duplicate", "a")
        assert "The optical images of dates 1 and 2 of a are one and the same" in problem.text
        for path in images["optical"]:
            fake_data.write_tiff(path, np.zeros((130, 100, 2), np.uint8))
        report = check(dataclasses.replace(layout, spec=spec, water=None))
        assert not found(report, "duplicate")  # nothing was seen at either

    def test_the_same_image_in_two_splits(self, toy):
        for kind in ("sar", "optical"):
            toy.write(kind, "d", toy.arrays["a"][kind])
        toy.write("label", "d", toy.arrays["a"]["label"])
        problem = only(check(toy.layout()))
        assert (problem.severity, problem.kind) == ("warning", "duplicate")
        assert "optical and sar image is the same in a (train), d (test)" in problem.text
        assert only(check(toy.layout(random=True))).kind == "duplicate"

    def test_what_may_be_the_same(self, toy):
        toy.write("label", "d", toy.arrays["a"]["label"])  # labels, as of tiles that are all one class
        toy.write("sar", "b", toy.arrays["a"]["sar"])  # two scenes of one split
        for name in "cd":
            toy.write("sar", name, np.zeros((130, 100), np.uint8))
        assert set(found(check(toy.layout(water=None)))) == {("no-data", "c.tif"), ("no-data", "d.tif")}


class TestWords:
    def test_text_is_short_and_json_is_whole(self, tmp_path):
        toy = Toy(tmp_path, names=tuple(f"s{i:02d}" for i in range(25)), size=(40, 40))
        for name in toy.names:
            toy.path("sar", name).write_bytes(b"")
        report = check(toy.layout(splits=dict.fromkeys(toy.names, "train"), water=None))
        assert len(report.problems) == 25
        text = render(report)
        assert text.count("is empty (0 bytes)") == SHOWN == 10
        assert "and 15 more." in text
        assert f"fatal, unreadable (25): {KINDS['unreadable']}" in text
        assert "25 fatal problem(s), 0 warning(s)." in text
        facts = json.loads(json.dumps(to_dict(report)))
        assert [p["where"] for p in facts["problems"]] == [str(toy.path("sar", n)) for n in toy.names]
        assert facts["fatal"] is True
        assert facts["kinds"] == {"unreadable": KINDS["unreadable"]}

    def test_numbers_are_in_text_and_json(self, toy):
        label = toy.arrays["a"]["label"]
        label[50:60, 50:57] = 35
        toy.write("label", "a", label)
        report = check(toy.layout())
        text, facts = render(report), json.loads(json.dumps(to_dict(report)))
        town = report.classes["val"][1]
        assert f"{town:,} ({town / sum(report.classes['val']):7.3%})" in text
        assert facts["classes"]["val"]["town"] == town
        assert facts["classes"]["val"]["ignored"] == 7
        assert facts["unknown"] == {str(toy.path("label", "a")): {"35": 70}}
        assert facts["tiles"] == {"train": 24, "val": 12, "test": 12}
        assert "NDWI on water minus elsewhere: +0." in text
        assert all(len(line) < 120 for line in text.splitlines() if not line.startswith("  /"))

    def test_every_kind_is_explained(self):
        documented = {kind.strip('". \n') for kind in Problem.__doc__.split("kind:")[1].split("where:")[0].split(",")}
        assert documented == set(KINDS)
        assert all(text.endswith(".") and "\n" not in text for text in KINDS.values())

    def test_fatal_comes_first(self, toy):
        missing = Problem("warning", "missing", "e", "e is missing.")
        toy.write("label", "a", np.full((130, 100), 35, np.uint8))
        problems = check(toy.layout(problems=(missing, missing))).problems
        assert [(p.severity, p.kind) for p in problems] == [("fatal", "labels"), ("warning", "missing")]
