"""The doctor: every problem at once, exact counts, whatever the tiles; and that no file can hurt it."""

import dataclasses
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import fake_data
import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.transform import from_origin
from scipy import ndimage

from sarjax import raster
from sarjax.data import tally
from sarjax.data.doctor import KINDS, SHOWN, check, render, to_dict
from sarjax.data.layout import Layout, Problem, Scene, WaterCheck
from sarjax.errors import UserError
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

TILE, GAP = 32, 9
WATER = 2
LABELS = {0: 255, 10: 0, 20: 1, 30: WATER}
SPEC = DatasetSpec(
    "toy",
    (
        ModalitySpec("sar", (BandSpec("VV", "amplitude"),), no_data=0, smallest_gap=GAP),
        ModalitySpec("optical", tuple(BandSpec(n, "reflectance") for n in ("green", "nir")), no_data=0),
    ),
    (ClassSpec("field", (1, 1, 1)), ClassSpec("town", (2, 2, 2)), ClassSpec("water", (0, 0, 9))),
)


class Toy:
    """A source of small scenes: lakes are wide and bright in green, all else is bright in nir."""

    def __init__(self, folder: Path, names=("a", "b", "c", "d"), size=(100, 130), ending="tif"):
        self.folder, self.ending = folder, ending
        self.names, self.arrays = names, {}
        for i, name in enumerate(names):
            rng = np.random.default_rng(i)
            w, h = size
            label = (10 + 10 * fake_data.blocks(rng, (h, w), 3, 40)).astype(np.uint8)
            label[-20:, -20:], label[:20, :20], label[:20, -20:] = 10, 20, 30  # each class in each scene
            label[0, :7] = 0
            sar = rng.integers(1, 200, (h, w), dtype=np.uint8)
            green, nir = rng.integers(60, 80, (2, h, w), dtype=np.uint8)
            nir = np.where(label == 30, nir - 30, nir + 30).astype(np.uint8)
            self.arrays[name] = {"sar": sar, "optical": np.stack([green, nir], -1), "label": label}
            for kind in self.arrays[name]:
                self.write(kind, name)

    def path(self, kind: str, name: str) -> Path:
        # PNGs have no two bands of their own: the optical image stays a TIFF.
        return self.folder / kind / f"{name}.{self.ending if kind != 'optical' else 'tif'}"

    def write(self, kind: str, name: str, image: np.ndarray | None = None) -> Path:
        path = self.path(kind, name)
        image = self.arrays[name][kind] if image is None else image
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.fromarray(image).save(path)
        else:
            fake_data.write_tiff(path, image)
        return path

    def layout(self, **changes) -> Layout:
        scenes = tuple(
            Scene(n, {kind: (self.path(kind, n),) for kind in ("sar", "optical")}, self.path("label", n))
            for n in self.names
        )
        splits = dict(zip(self.names, ("train", "train", "val", "test"), strict=False))
        given = {"labels": LABELS, "splits": splits, "tile": TILE, "water": WaterCheck("optical", 0, 1, WATER)}
        return Layout(SPEC, scenes=scenes, **given | changes)


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path / "scenes")


def found(report, kind=None):
    """(kind, file or scene) of the problems."""
    return [(p.kind, Path(p.where).name) for p in report.problems if kind in (None, p.kind)]


def only(report):
    """The one problem that there is."""
    assert len(report.problems) == 1, render(report)
    return report.problems[0]


def histogram(labels) -> tuple[tuple[int, ...], int]:
    """Pixels per class, and ignored ones."""
    stored = np.concatenate([label.ravel() for label in labels])
    return tuple(int((stored == value).sum()) for value in (10, 20, 30)), int((stored == 0).sum())


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
        empty, invalid = {}, {"sar": 0, "optical": 0}
        for name in toy.names:
            dark = toy.arrays[name]["sar"] == 0
            regions, n = ndimage.label(dark, np.ones((3, 3)))
            sizes = ndimage.sum_labels(dark, regions, range(n + 1))
            no_sar = dark & (sizes[regions] >= GAP)
            no_optical = ~toy.arrays[name]["optical"].any(-1)
            invalid["sar"] += no_sar.sum()
            invalid["optical"] += no_optical.sum()
            blind = no_sar & no_optical
            rows, columns = (
                [*range(0, n - tile + 1, tile)] + ([n - tile] if cover and n % tile else []) for n in (h, w)
            )
            tiles = sum(blind[r : r + tile, c : c + tile].all() for r in rows for c in columns)
            if tiles:
                empty[name] = tiles
            assert report.tiles["train"] == 2 * len(rows) * len(columns)
        assert report.empty_tiles == empty
        assert [p.where for p in report.problems if p.kind == "no-data"] == sorted(empty)
        for modality, pixels in invalid.items():
            assert report.no_data[modality] == pytest.approx(pixels / (4 * w * h), abs=1e-12)
        for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
            counts = histogram(toy.arrays[name]["label"] for name in names)
            assert (report.classes[split], report.ignored[split]) == counts
        assert report == check(layout)

    def test_memory_does_not_grow_with_a_scene(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tally, "WINDOW_VALUES", 2**17)
        peaks = []
        for factor in (1, 8):
            toy = Toy(tmp_path / str(factor), names=("a",), size=(256, 1024 * factor))
            layout = toy.layout()
            toy.arrays.clear()
            tracemalloc.start()
            assert not found(check(layout), "unreadable")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.3 * peaks[0]


class TestFiles:
    @pytest.mark.parametrize("ending", ["tif", "png"])
    def test_all_that_cannot_be_read_is_found_at_once(self, tmp_path, ending):
        toy = Toy(tmp_path, size=(200, 200), ending=ending)
        empty = toy.path("sar", "a")
        empty.write_bytes(b"")
        cut = toy.path("sar", "b")
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
        text = toy.path("label", "c")
        text.write_text("no image")
        gone = toy.path("optical", "d")
        gone.unlink()
        report = check(toy.layout())
        assert sorted(found(report)) == sorted(("unreadable", p.name) for p in (empty, cut, text, gone))
        assert all(p.severity == "fatal" and str(toy.folder) in p.text for p in report.problems)
        assert report.exit_code == 1
        # What can be read is counted all the same.
        counts = histogram(toy.arrays[name]["label"] for name in "ab")
        assert (report.classes["train"], report.ignored["train"]) == counts
        assert report.classes["test"] == histogram([toy.arrays["d"]["label"]])[0]
        assert report.classes["val"] == (0, 0, 0)
        # The header of the TIFF that was cut is sound.
        assert report.tiles == {"train": 36 if ending == "tif" else 0, "val": 0, "test": 0}

    def test_a_file_cut_in_its_last_strip_has_a_sound_header(self, tmp_path):
        toy = Toy(tmp_path, size=(200, 400))
        path = toy.path("label", "a")
        path.write_bytes(path.read_bytes()[:-10])
        raster.info(path)
        report = check(toy.layout())
        assert found(report) == [("unreadable", "a.tif")]
        assert report.classes["train"] == histogram([toy.arrays["b"]["label"]])[0]
        assert report.ndwi["a"] == (None,)

    def test_half_an_image_counts_for_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tally, "WINDOW_VALUES", 1)
        toy = Toy(tmp_path, size=(100, 400))
        for kind in ("sar", "optical"):
            toy.arrays["a"][kind][:96] = 0
            toy.write(kind, "a")
        path = toy.path("optical", "a")
        path.write_bytes(path.read_bytes()[:-10])
        report = check(toy.layout())
        assert found(report) == [("unreadable", "a.tif")]
        assert not report.empty_tiles
        assert report.ndwi["a"] == (None,)
        assert report.no_data["optical"] == 0
        assert report.no_data["sar"] == pytest.approx(96 / 1600)

    def test_a_whole_png_with_damaged_pixels(self, tmp_path):
        toy = Toy(tmp_path, ending="png")
        path = toy.path("sar", "a")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        assert found(check(toy.layout())) == [("unreadable", "a.png")]

    def test_sizes_that_disagree(self, toy):
        for kind, name in (("sar", "a"), ("label", "b"), ("optical", "b")):
            toy.write(kind, name, np.swapaxes(toy.arrays[name][kind], 0, 1).copy())
        label = np.where(toy.arrays["b"]["label"] == 10, 35, toy.arrays["b"]["label"])
        toy.write("label", "b", label.T.copy())
        report = check(toy.layout())
        # Nothing is read across different sizes, but each file is read: the wrong label is found as well.
        assert {kind for kind, _ in found(report)} == {"size", "labels"}
        assert report.tiles == {"train": 0, "val": 12, "test": 12}
        # Said of the odd one out, wherever it comes.
        where = [toy.path("sar", name) for name in "ab"]
        assert [Path(p.where) for p in report.problems if p.kind == "size"] == where
        assert f"{where[0]} is 130 x 100 pixels, but {toy.path('optical', 'a')} is 100 x 130" in report.problems[0].text

    def test_smaller_than_a_tile(self, toy):
        report = check(toy.layout(tile=128))
        assert [p.kind for p in report.problems] == ["size"] * 4
        assert sum(map(sum, report.classes.values())) > 0

    def test_bands_and_dtypes(self, toy):
        toy.write("optical", "a", np.zeros((130, 100, 3), np.uint8))
        toy.write("sar", "b", np.ones((130, 100), np.uint16))
        toy.write("label", "c", np.zeros((130, 100, 3), np.uint8))
        toy.write("label", "d", np.zeros((130, 100), np.float32))
        report = check(toy.layout())
        assert sorted(found(report)) == [
            ("bands", "a.tif"), ("bands", "c.tif"), ("bands", "d.tif"), ("dtype", "b.tif"),
        ]  # fmt: skip
        assert report.fatal

    def test_a_file_of_the_wrong_kind_is_decoded_too(self, toy):
        path = toy.write("optical", "a", np.random.default_rng(0).integers(0, 256, (130, 100, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:-10])
        assert found(check(toy.layout())) == [("unreadable", "a.tif"), ("bands", "a.tif")]

    def test_no_scene_at_all(self, toy):
        problem = only(check(toy.layout(splits={})))
        assert (problem.severity, problem.kind) == ("fatal", "missing")
        said = Problem("fatal", "missing", "x", "Nothing is there.")
        assert check(toy.layout(splits={}, problems=(said,))).problems == (said,)

    def test_nothing_to_train_on(self, toy):
        problem = only(check(toy.layout(splits=dict.fromkeys("abcd", "test"))))
        assert (problem.severity, problem.kind, problem.where) == ("fatal", "split", "train")


class TestGeoreference:
    @staticmethod
    def place(path: Path, west: float, crs: str = "EPSG:32649"):
        with rasterio.open(path, "r+") as f:
            f.crs, f.transform = crs, from_origin(west, 3_000_000, 10, 10)

    def test_one_pixel_or_another_projection_is_too_far(self, toy):
        for name in toy.names:
            for kind in ("sar", "optical", "label"):
                self.place(toy.path(kind, name), 500_000)
        assert not check(toy.layout()).problems
        self.place(toy.path("label", "a"), 500_010)
        self.place(toy.path("optical", "b"), 500_000, "EPSG:32650")
        self.place(toy.path("sar", "c"), 500_003)  # a third of a pixel
        report = check(toy.layout())
        assert found(report) == [("georeference", "a.tif"), ("georeference", "b.tif")]
        assert "1.0 pixels away" in report.problems[0].text
        assert "EPSG:32650" in report.problems[1].text

    def test_a_label_without_a_place_lies_where_the_images_do(self, toy):
        for kind in ("sar", "optical"):
            self.place(toy.path(kind, "a"), 500_000)
        assert not check(toy.layout()).problems


class TestLabels:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32])
    def test_unknown_values_are_counted(self, toy, dtype):
        label = toy.arrays["a"]["label"].astype(dtype)
        label[50:60, 50:57] = 35
        label[129, 99] = 77
        path = toy.write("label", "a", label)
        report = check(toy.layout())
        problem = only(report)
        assert (problem.severity, problem.kind, problem.where) == ("fatal", "labels", str(path))
        assert report.unknown == {str(path): {35: 70, 77: 1}}
        assert "35 (70 pixels, 0.538%), 77 (1 pixels, 0.008%)" in problem.text
        assert "labels are 0, 10, 20, 30." in problem.text
        counts = histogram([label, toy.arrays["b"]["label"]])
        assert (report.classes["train"], report.ignored["train"]) == counts

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

    def test_an_image_that_saw_nothing(self, toy):
        toy.write("sar", "a", np.zeros((130, 100), np.uint8))
        assert found(check(toy.layout())) == [("no-data", "a.tif")]
        toy.write("optical", "a", np.zeros((130, 100, 2), np.uint8))
        assert found(check(toy.layout())) == [("no-data", "a")]  # said once of the scene


class TestAlignment:
    @pytest.fixture
    def lakes(self, tmp_path):
        return Toy(tmp_path, names=("a", "b", "c"), size=(200, 200))

    def test_the_difference_is_exact(self, lakes):
        optical, label = (lakes.arrays["a"][k] for k in ("optical", "label"))
        optical[150:, 150:] = 0  # no-data say nothing of water
        lakes.write("optical", "a")
        green, nir = optical[..., 0].astype(float), optical[..., 1].astype(float)
        index = (green - nir) / np.where(green + nir > 0, green + nir, 1)
        seen = optical.any(-1)
        wet, dry = seen & (label == 30), seen & (label != 30) & (label != 0)
        (measured,) = check(lakes.layout()).ndwi["a"]
        assert measured == pytest.approx(index[wet].mean() - index[dry].mean(), abs=1e-6)
        assert measured > 0.2

    def test_shifted_labels_are_flagged(self, lakes):
        lakes.write("label", "b", np.roll(lakes.arrays["b"]["label"], (37, 53), (0, 1)))
        report = check(lakes.layout())
        problem = only(report)
        assert (problem.severity, problem.kind, problem.where) == ("warning", "alignment", "b")
        assert report.ndwi["b"][0] < 0.09 < report.ndwi["a"][0]
        assert f"{report.ndwi['b'][0]:+.3f}" in problem.text

    def test_labels_of_another_scene_are_flagged(self, lakes):
        lakes.write("label", "c", lakes.arrays["a"]["label"])
        assert found(check(lakes.layout())) == [("alignment", "c")]

    def test_not_asked_for(self, lakes):
        lakes.write("label", "b", np.roll(lakes.arrays["b"]["label"], (37, 53), (0, 1)))
        report = check(lakes.layout(water=None))
        assert not report.problems
        assert not report.ndwi

    @pytest.mark.parametrize(("wet", "dry"), [(999, None), (None, 999), (0, None), (None, 0)])
    def test_too_few_pixels_are_not_judged(self, lakes, wet, dry):
        """`wet` pixels of water, or `dry` of anything else, all in the wrong place."""
        label = np.full(200 * 200, 10 if dry is None else 30, np.uint8)
        label[: wet or dry or 0] = 30 if dry is None else 10
        lakes.arrays["a"]["optical"][:] = (60, 90) if dry is None else (90, 60)
        lakes.write("optical", "a")
        lakes.write("label", "a", label.reshape(200, 200))
        report = check(lakes.layout())
        assert report.ndwi["a"] == (None,)
        assert not found(report, "alignment")
        label[:1000] = 30 if dry is None else 10
        lakes.write("label", "a", label.reshape(200, 200))
        report = check(lakes.layout())
        assert report.ndwi["a"] == (0,)
        assert found(report, "alignment") == [("alignment", "a")]

    def test_each_date_is_judged(self, lakes, tmp_path):
        moved = np.roll(lakes.arrays["b"]["optical"], (37, 53), (0, 1))
        fake_data.write_tiff(tmp_path / "later.tif", moved)
        layout = lakes.layout()
        scenes = tuple(
            s._replace(
                images={m: (*p, tmp_path / "later.tif" if m == "optical" else p[0]) for m, p in s.images.items()}
            )
            for s in layout.scenes
            if s.name == "b"
        )
        spec = dataclasses.replace(SPEC, dates=2)
        report = check(dataclasses.replace(layout, spec=spec, scenes=scenes, splits={"b": "train"}))
        assert only(report).kind == "alignment"
        assert report.ndwi["b"][0] > 0.2
        assert report.ndwi["b"][1] < 0.09


class TestDuplicates:
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


def tiff(width: int, height: int, rows_per_strip: int, compression: int) -> bytes:
    """A TIFF of uint8 that declares a size, and whose strips all are the same 64 bytes."""
    strips = -(-height // rows_per_strip)
    end = 8 + 2 + 9 * 12 + 4
    offsets, lengths = (end, 64) if strips == 1 else (end, end + 4 * strips)
    fields = (
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
        (273, 4, strips, offsets), (277, 3, 1, 1), (278, 4, 1, rows_per_strip), (279, 4, strips, lengths),
    )  # fmt: skip
    out = b"II*\0" + struct.pack("<IH", 8, len(fields))
    out += b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)
    if strips > 1:
        out += struct.pack(f"<{strips}I", *[end + 8 * strips] * strips) + struct.pack(f"<{strips}I", *[64] * strips)
    return out + bytes(64)


def png(width: int, height: int, interlaced: bool = False) -> bytes:
    """A PNG of uint8 whose header is right, and whose data end early."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*c) for c in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    )


def sparse(path: Path) -> None:
    """40 billion pixels in a thousand bytes: none of the strips is there, which stands for zeros."""
    profile = {"driver": "GTiff", "width": 200_000, "height": 200_000, "count": 1, "dtype": "uint8", "compress": "lzw"}
    with rasterio.open(path, "w", blockysize=2000, SPARSE_OK=True, **profile):
        pass


LZW, RAW, DEFLATE = 5, 1, 8
BOMBS = {
    "strips.tif": tiff(200_000, 200_000, 1000, LZW),
    "wide.tif": tiff(2_000_000_000, 4, 1, LZW),
    "strip_raw.tif": tiff(60_000, 60_000, 60_000, RAW),
    "strip_lzw.tif": tiff(60_000, 60_000, 60_000, LZW),
    "strip_deflate.tif": tiff(60_000, 60_000, 60_000, DEFLATE),
    "huge_strip.tif": tiff(100_000, 100_000, 100_000, LZW),
    "tall.tif": tiff(64, 100_000_000, 100_000_000, LZW),
    "large.png": png(100_000, 100_000),
    "largest.png": png(2**31 - 1, 2**31 - 1),
    "lines.png": png(90_000, 90_000),
    "interlaced.png": png(90_000, 90_000, interlaced=True),
}


class TestBombs:
    def test_no_file_takes_memory_or_time(self, tmp_path):
        """Some are refused by their headers; what is left fails at its first window."""
        for name, content in BOMBS.items():
            (tmp_path / name).write_bytes(content)
        sparse(tmp_path / "sparse.tif")
        names = sorted([*BOMBS, "sparse.tif"])
        assert all((tmp_path / name).stat().st_size < 5000 for name in names)
        for name in ("sound.tif", "label.tif"):
            fake_data.write_tiff(tmp_path / name, np.full((64, 64), 10, np.uint8))
        program = """
import json, resource, sys, time
from pathlib import Path
from sarjax.data.doctor import check
from sarjax.data.layout import Layout, Scene
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec
folder, names = Path(sys.argv[1]), sys.argv[2:]
classes = ClassSpec("a", (0, 0, 0)), ClassSpec("b", (1, 1, 1))
spec = DatasetSpec("x", (ModalitySpec("sar", (BandSpec("VV", "amplitude"),)),), classes)
sound, label = folder / "sound.tif", folder / "label.tif"
scenes = [Scene(n, {"sar": (folder / n,)}, label) for n in names] + [Scene("good", {"sar": (sound,)}, label)]
splits = {s.name: "train" for s in scenes}
check(Layout(spec, {10: 0}, tuple(scenes[-1:]), splits, tile=32))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
report = check(Layout(spec, {10: 0}, tuple(scenes), splits, tile=32))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
seconds = time.monotonic() - start
fatal = [(p.kind, Path(p.where).name) for p in report.problems if p.severity == "fatal"]
print(json.dumps([grown, seconds, fatal, report.classes["train"]]))
"""
        done = subprocess.run([sys.executable, "-c", program, tmp_path, *names], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        megabytes, seconds, fatal, classes = json.loads(done.stdout)
        assert sorted(name for kind, name in fatal if kind == "unreadable") == names
        assert classes == [64 * 64 * (len(names) + 1), 0]  # the others are read, each scene's label too
        assert megabytes < 200
        assert seconds < 20

    @pytest.mark.parametrize("name", ["strips.tif", "wide.tif", "huge_strip.tif", "large.png", "sparse.tif"])
    def test_refused_by_the_header(self, tmp_path, name):
        path = tmp_path / name
        sparse(path) if name == "sparse.tif" else path.write_bytes(BOMBS[name])
        with pytest.raises(UserError, match=r"declares .* damaged or hostile|do not fit in memory"):
            raster.info(path)


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
        for kind in ("sar", "optical"):
            toy.write(kind, "a", np.zeros_like(toy.arrays["a"][kind]))
        toy.path("sar", "d").write_bytes(b"")
        assert [p.severity for p in check(toy.layout()).problems] == ["fatal", "warning"]
