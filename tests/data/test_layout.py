"""Layouts: which tiles cover an axis, which scene is in which split, what headers give away."""

from pathlib import Path

import fake_data
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax import raster
from sarjax.data import layout
from sarjax.data.layout import (
    Layout,
    Scene,
    check_scene,
    in_words,
    listed,
    off_scale,
    read_labels,
    read_names,
    split_by_order,
    tile_origins,
)
from sarjax.errors import UserError
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

SPEC = DatasetSpec(
    "x",
    (ModalitySpec("sar", (BandSpec("VV", "amplitude"),)), ModalitySpec("optical", (BandSpec("red", "reflectance"),))),
    (ClassSpec("a", (0, 0, 0)), ClassSpec("b", (1, 1, 1))),
)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2000))
def test_tiles_along_an_axis(tile, more):
    length = tile + more
    plain, cover = (tile_origins(length, tile, c) for c in (False, True))
    assert plain == [i * tile for i in range(length // tile)]
    assert cover[: len(plain)] == plain
    assert len(cover) - len(plain) == (length % tile > 0)
    assert cover[-1] + tile == length or cover[-1] + tile > length - tile >= plain[-1]
    assert set(range(length)) == {p for first in cover for p in range(first, first + tile)}


@settings(deadline=None)
@given(st.integers(0, 60), st.booleans())
def test_a_split_by_order(count, validation):
    names = [f"{i:03d}" for i in range(count)]
    where = split_by_order(reversed(names), validation)
    assert set(where) == set(names)
    if count < 3:
        assert set(where.values()) <= {"train"}
        return
    assert {"train", "test"} <= set(where.values()) <= {"train", "test", "val"}
    assert ("val" in where.values()) == validation
    for ten in range(count // 10):
        part = [where[name] for name in names[10 * ten : 10 * ten + 10]]
        assert [part.count(split) for split in ("train", "val", "test")] == ([7, 1, 2] if validation else [8, 0, 2])


def test_drawn_tiles_are_where_their_names_say():
    drawn = [layout.drawn_split(f"scene/r{i:05d}c00000") for i in range(4000)]
    np.testing.assert_allclose([drawn.count(s) / 4000 for s in ("train", "val", "test")], [0.6, 0.2, 0.2], atol=0.02)
    # For good: records would change.
    assert "".join(split[1] for split in drawn[:20]) == "rrrerreaerarrrerrrrr"


def test_lists_of_names():
    assert listed([]) == ""
    assert listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listed(range(13), 2) == "0, 1 and 11 more"


def test_names_from_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffa.tif\r\n\r\n  b c \r\n# d\n".encode())
    assert read_names(path) == ("a.tif", "b c")
    path.write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"names.txt cannot be read \(no text in UTF-8\): .* one name a line"):
        read_names(path)
    with pytest.raises(UserError, match=r"gone.txt cannot be read \(No such file or directory\)"):
        read_names(tmp_path / "gone.txt")


def test_leaving_out():
    scenes = [Scene(name, {}, None) for name in ("a", "b.1", "c")]
    assert [s.name for s in layout.without(scenes, ("a.TIF", "b.1"))] == ["c"]
    assert [s.name for s in layout.without(scenes, ("z.tif",), known=("z",))] == ["a", "b.1", "c"]
    with pytest.raises(UserError, match=r"unknown scene to exclude 'b': did you mean 'b.1'|known: a, b.1, c"):
        layout.without(scenes, ("b",))
    many = [Scene(f"NH49E{i:06d}", {}, None) for i in range(12)]
    with pytest.raises(UserError, match=r"'nix': known: NH49E000000, (NH49E\d{6}, ){8}NH49E000009 and 2 more\.$"):
        layout.without(many, ("nix",))
    with pytest.raises(UserError, match=r"NH49E000008, NH49E000009\.$"):
        layout.without(many[:10], ("nix",))


def test_endings():
    assert [layout.without_ending(n) for n in ("a.tif", "a.JPEG", "a.b", "a.b.png", "a", ".tif")] == [
        *("a", "a", "a.b", "a.b", "a", "")
    ]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32"])
def test_labels(tmp_path, dtype):
    stored = np.array([[0, 10, 20], [20, 20, 7]], dtype)
    fake_data.write_tiff(tmp_path / "l.tif", stored)
    with raster.open_raster(tmp_path / "l.tif") as f:
        found = read_labels(f, {0: 255, 10: 0, 20: 1, 7: 0, 99: 2}, (0, 0, 2, 3))
        assert (found.dtype, found.tolist()) == (np.uint8, [[255, 0, 1], [1, 1, 0]])
        assert read_labels(f, {20: 1}, (0, 2, 1, 1)).tolist() == [[1]]
        with pytest.raises(UserError, match=r"l.tif holds the label 7: labels are 0, 10, 20\."):
            read_labels(f, {20: 1, 10: 0, 0: 255}, (0, 0, 2, 3))


class TestHeaders:
    @pytest.fixture
    def scene(self, tmp_path):
        for kind in ("sar", "optical", "label"):
            fake_data.write_tiff(tmp_path / f"{kind}.tif", np.zeros((40, 50), np.uint8))
        return Scene("s", {m: (tmp_path / f"{m}.tif",) for m in ("sar", "optical")}, tmp_path / "label.tif")

    def found(self, scene, tile=32):
        size, problems = check_scene(scene, SPEC, tile)
        assert all(p.severity == "fatal" and len(p.text.splitlines()) == 1 and p.text.endswith(".") for p in problems)
        return size, [(p.kind, p.where.rsplit("/")[-1]) for p in problems]

    def test_nothing_is_wrong(self, scene):
        assert self.found(scene) == ((40, 50), [])

    def test_too_small(self, scene):
        assert self.found(scene, 41) == ((40, 50), [("size", "sar.tif")])

    @pytest.mark.parametrize(("tile", "kinds"), [(32, ["size"]), (40, ["size"])])
    def test_a_scene_that_is_one_tile(self, scene, tile, kinds):
        assert [k for k, _ in self.found(scene._replace(tile_id=3), tile)[1]] == kinds

    def test_a_scene_that_is_one_tile_of_the_right_size(self, tmp_path, scene):
        for path in scene.files:
            fake_data.write_tiff(path, np.zeros((32, 32), np.uint8))
        assert self.found(scene._replace(tile_id=3)) == ((32, 32), [])

    @pytest.mark.parametrize(
        ("file", "array", "kind"),
        [
            ("sar", np.zeros((40, 49), np.uint8), "size"),
            ("label", np.zeros((41, 50), np.uint8), "size"),
            ("sar", np.zeros((40, 50, 2), np.uint8), "bands"),
            ("optical", np.zeros((40, 50), np.uint16), "dtype"),
            ("label", np.zeros((40, 50, 3), np.uint8), "bands"),
            ("label", np.zeros((40, 50), np.float32), "bands"),
        ],
    )
    def test_one_file_does_not_fit(self, tmp_path, scene, file, array, kind):
        fake_data.write_tiff(tmp_path / f"{file}.tif", array)
        assert self.found(scene) == ((40, 50), [(kind, f"{file}.tif")])

    def test_what_cannot_be_read(self, tmp_path, scene):
        (tmp_path / "sar.tif").write_bytes(b"")
        assert self.found(scene) == ((40, 50), [("unreadable", "sar.tif")])
        for path in scene.files:
            path.write_bytes(b"")
        assert self.found(scene)[0] == (0, 0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([255, 0], "0, 255"),
        ([2, 1, 0, 7, 5, 4, -1], "-1 to 2, 4, 5, 7"),
        ([0, 1, *range(128, 256)], "0, 1, 128 to 255"),
    ],
)
def test_numbers_in_words(values, text):
    assert in_words(values) == text


class TestOffScale:
    @staticmethod
    def asked_for(highest, splits, threshold=128, random=False):
        """(where problems are, scenes that were asked for) with the largest label of each scene."""
        scenes = tuple(Scene(name, {}, Path(name)) for name in highest)
        asked = []

        def of(scene):
            asked.append(scene.name)
            return highest[scene.name]

        labels = {0: 0, 255: 1} if threshold is None else {v: int(v >= threshold) for v in range(256)}
        spread = Layout(SPEC, labels, scenes, splits, random=random, threshold=threshold)
        return [p.where for p in off_scale(spread, of)], "".join(asked)

    def test_it_stops_at_the_first_that_reaches(self):
        assert self.asked_for({"a": 0, "b": 200, "c": 1}, dict.fromkeys("abc", "train")) == ([], "ab")

    def test_the_first_of_each_split_is_named(self):
        splits = {"a": "train", "b": "train", "c": "val", "d": "train", "e": "test"}
        highest = {"a": 0, "b": 1, "c": 128, "d": 127, "e": 1}
        assert self.asked_for(highest, splits) == (["b", "e"], "abdce")

    def test_nothing_is_no_scale(self):
        assert self.asked_for({"a": 0, "b": 0}, dict.fromkeys("ab", "train")) == ([], "ab")

    def test_what_is_in_no_split_does_not_count(self):
        assert self.asked_for({"a": 255, "b": 1}, {"b": "train"}) == (["b"], "b")

    def test_tiles_drawn_at_random_are_of_one(self):
        assert self.asked_for({"a": 1, "b": 255}, {}, random=True) == ([], "ab")

    def test_not_asked_for(self):
        assert self.asked_for({"a": 1}, {"a": "train"}, threshold=None) == ([], "")
