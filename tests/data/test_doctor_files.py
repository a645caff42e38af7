"""The doctor and files that cannot be read, do not fit together, or would harm it."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import fake_data
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from toy_scenes import TILE, Toy, found, histogram, only

from sarjax import raster
from sarjax.data import tally
from sarjax.data.doctor import check, render
from sarjax.data.layout import Problem
from sarjax.errors import UserError


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path / "scenes")


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

    def test_a_file_cut_in_its_last_strip_has_a_sound_header(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tally, "WINDOW_VALUES", 1)
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

    def test_a_bad_file_hides_no_other_problem(self, toy):
        toy.path("sar", "a").write_bytes(b"")
        toy.write("label", "a", toy.arrays["a"]["label"][:-1])
        toy.write("optical", "a", np.zeros((130, 100, 3), np.uint8))
        assert found(check(toy.layout())) == [("unreadable", "a.tif"), ("size", "a.tif"), ("bands", "a.tif")]

    def test_a_file_of_two_scenes_is_named_once(self, toy):
        path = toy.path("sar", "a")
        path.write_bytes(path.read_bytes()[:-10])
        scenes = [s._replace(images=s.images | {"sar": (path,)}) for s in toy.layout().scenes]
        assert found(check(toy.layout(scenes=tuple(scenes)))) == [("unreadable", "a.tif")]

    def test_smaller_than_a_tile(self, toy):
        report = check(toy.layout(tile=128))
        assert [p.kind for p in report.problems] == ["size"] * 4
        assert sum(map(sum, report.classes.values())) > 0

    def test_bands_and_dtypes(self, toy):
        toy.write("optical", "a", np.zeros((130, 100, 3), np.uint8))
        toy.arrays["a"]["sar"][:TILE, :TILE] = 0  # what the optical image saw there is not known
        toy.write("sar", "a")
        toy.write("sar", "b", np.zeros((130, 100), np.uint16))  # no gap: these numbers mean nothing
        toy.write("label", "c", np.zeros((130, 100, 3), np.uint8))
        toy.write("label", "d", np.zeros((130, 100), np.float32))
        report = check(toy.layout())
        assert sorted(found(report)) == [
            ("bands", "a.tif"), ("bands", "c.tif"), ("bands", "d.tif"), ("dtype", "b.tif"),
        ]  # fmt: skip
        assert report.fatal
        assert not report.empty_tiles
        assert report.no_data == {"sar": pytest.approx(TILE**2 / 39000), "optical": 0}

    def test_a_file_of_the_wrong_kind_is_decoded_too(self, toy):
        path = toy.write("optical", "a", np.random.default_rng(0).integers(0, 256, (130, 100, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:-10])
        assert found(check(toy.layout())) == [("unreadable", "a.tif"), ("bands", "a.tif")]

    def test_no_scene_at_all(self, toy):
        problem = only(check(toy.layout(scenes=())))
        assert (problem.severity, problem.kind) == ("fatal", "missing")
        said = Problem("fatal", "missing", "x", "Nothing is there.")
        report = check(toy.layout(scenes=(), problems=(said,)))
        assert report.problems == (said,)
        assert render(report)

    def test_scenes_are_read_though_their_splits_are_unknown(self, toy):
        toy.path("sar", "b").write_bytes(b"")
        said = Problem("fatal", "split", "x", "The lists contradict each other.")
        report = check(toy.layout(splits={}, problems=(said,)))
        assert found(report) == [("unreadable", "b.tif"), ("split", "x")]
        assert report.scenes == {"none": 4}
        assert found(check(toy.layout(splits={})), "split") == [("split", "train")]

    def test_nothing_to_train_on(self, toy):
        problem = only(check(toy.layout(splits=dict.fromkeys("abcd", "test"))))
        assert (problem.severity, problem.kind, problem.where) == ("fatal", "split", "train")


class TestGeoreference:
    @staticmethod
    def place(path: Path, west: float, crs: str | None = "EPSG:32649"):
        with rasterio.open(path, "r+") as f:
            f.transform = from_origin(west, 3_000_000, 10, 10)
            if crs:
                f.crs = crs

    def test_one_pixel_or_another_projection_is_too_far(self, toy):
        for name in toy.names:
            for kind in ("sar", "optical", "label"):
                self.place(toy.path(kind, name), 500_000)
        assert not check(toy.layout()).problems
        self.place(toy.path("label", "a"), 500_010)
        self.place(toy.path("optical", "b"), 500_000, "EPSG:32650")
        self.place(toy.path("sar", "c"), 500_000.9)  # nine hundredths of a pixel
        self.place(toy.path("sar", "d"), 500_003)
        report = check(toy.layout())
        assert found(report) == [("georeference", f"{name}.tif") for name in ("a", "d", "b", "d")]
        assert all("0.3 pixels away" in report.problems[i].text for i in (1, 3))
        assert "1.0 pixels away" in report.problems[0].text
        assert "EPSG:32650" in report.problems[2].text

    def test_a_label_without_a_place_lies_where_the_images_do(self, toy):
        for kind in ("sar", "optical"):
            self.place(toy.path(kind, "a"), 500_000)
        assert not check(toy.layout()).problems

    @pytest.mark.parametrize("bare", ["sar", "optical", "label"])
    def test_a_file_without_a_reference_system_is_taken_to_be_in_that_of_the_others(self, toy, bare):
        for kind in ("sar", "optical", "label"):
            self.place(toy.path(kind, "a"), 500_000, None if kind == bare else "EPSG:32649")
        assert not check(toy.layout()).problems
        self.place(toy.path(bare, "a"), 500_020, None)
        assert {p.kind for p in check(toy.layout()).problems} == {"georeference"}
        assert all("2.0 pixels away" in p.text for p in check(toy.layout()).problems)

    def test_a_file_that_says_less_hides_no_other(self, toy):
        self.place(toy.path("sar", "a"), 500_000, None)
        self.place(toy.path("optical", "a"), 500_000)
        self.place(toy.path("label", "a"), 500_000, "EPSG:32650")
        problem = only(check(toy.layout()))
        assert (problem.severity, problem.kind, problem.where) == ("fatal", "georeference", str(toy.path("label", "a")))
        assert "is in EPSG:32650, but" in problem.text


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
