"""A map made by windows is the map of the whole image; what was not seen is no-data; nothing half-made is left."""

import dataclasses
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes.scene_files import PLACE, SPEC, Case, pixels, same_map, write_scene

from sarjax import raster
from sarjax.config import Inputs
from sarjax.errors import UserError
from sarjax.options import FCN, LANet
from sarjax.scenes.classes import FEW, most_probable
from sarjax.scenes.inputs import parse_scenes
from sarjax.scenes.predict import map_scene
from sarjax.scenes.stages import Stages
from sarjax.scenes.symmetry import over_symmetries

SMALL = FCN(width=1 / 16, stages=1)  # alignment 4, radius 30
BOTH = Inputs(modalities=("sar", "optical"))


def scene_of(case, paths):
    (scene,) = parse_scenes([",".join(f"{m}={paths[m]}" for m in case.reads.modalities)], case.reads)
    return scene


def maps(case, engine, paths, out, **options):
    """(labels (h, w), probabilities (h, w, k), what `map_scene` returned)."""
    out.mkdir(exist_ok=True)
    mapped = map_scene(engine, scene_of(case, paths), out / "m.tif", out / "p.tif", **options)
    return raster.read(out / "m.tif")[..., 0], raster.read(out / "p.tif"), mapped


def images(case, height, width, seed=0):
    return {m: pixels(height, width, len(SPEC.modality(m).bands), seed)[None] for m in case.reads.modalities}


@pytest.fixture(scope="module")
def fcn():
    return Case(SMALL)


@pytest.mark.parametrize("size", [(203, 170), (128, 96), (50, 333), (97, 64), (5, 3)])
def test_windows_of_a_local_network_are_the_whole_image(fcn, tmp_path, size):
    paths = write_scene(tmp_path / "in", *size)
    labels, probabilities, mapped = maps(fcn, fcn.engine(96, 32, rows=3), paths, tmp_path / "out")
    expected, seen = fcn.whole(images(fcn, *size))
    same_map(labels, probabilities, expected, seen)
    assert mapped.no_data == (~seen).sum()
    assert list(mapped.classes) == np.bincount(labels[seen], minlength=3).tolist()


@pytest.mark.parametrize(("windows", "asked"), [((96, 32), "classify"), ((64, 8), "apply")])
def test_a_map_without_probabilities(fcn, tmp_path, windows, asked):
    """Windows that agree on what they share give classes alone; others are blended as ever."""
    paths, calls = write_scene(tmp_path / "in", 203, 170), []
    engine = fcn.engine(*windows)
    blended, values, mapped = maps(fcn, engine, paths, tmp_path / "out")
    counting = {
        name: lambda batch, name=name: calls.append(name) or getattr(engine, name)(batch)
        for name in ("apply", "classify")
    }
    stages = Stages()
    alone = map_scene(engine._replace(**counting), scene_of(fcn, paths), tmp_path / "m.tif", stages=stages)
    assert set(calls) == {asked}
    top = np.sort(np.nan_to_num(values), -1)
    sure = (top[..., -1] - top[..., -2] > 1e-5) | (blended == 255)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(raster.read(tmp_path / "m.tif")[..., 0][sure], blended[sure])
    assert (sum(alone.classes), alone.no_data) == (sum(mapped.classes), mapped.no_data)
    assert all(seconds > 0 for seconds in stages.seconds.values()), stages.seconds


@pytest.mark.parametrize("classes", [1, 2, 8, FEW, FEW + 1])
def test_the_most_probable_class(classes):
    scores = np.random.default_rng(0).integers(0, 3, (4, 5, classes)).astype(np.float32)  # with ties: the first
    found = most_probable(scores)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, scores.argmax(-1))


@settings(max_examples=6, deadline=None)
@given(st.tuples(st.integers(1, 260), st.integers(1, 260)), st.sampled_from([(68, 32), (96, 32), (100, 36)]))
def test_whatever_the_size(size, windows):
    case = Case(SMALL)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_scene(Path(folder) / "in", *size)
        _, probabilities, _ = maps(case, case.engine(*windows), paths, Path(folder) / "out")
    expected, seen = case.whole(images(case, *size))
    np.testing.assert_array_equal(np.isnan(probabilities).any(-1), ~seen)
    np.testing.assert_allclose(probabilities[seen], expected[seen], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "inputs", "size"),
    [
        (LANet(width=1 / 16, output_stride=8), Inputs(modalities=("sar",)), (410, 437)),
        (LANet(width=1 / 16), BOTH, (500, 70)),
        (FCN(width=1 / 16, stages=2), Inputs(modalities=("optical",), local_mean=11), (230, 301)),
    ],
    ids=["lanet_stride_8", "lanet_both", "fcn_local_mean"],
)
def test_other_networks_and_inputs(tmp_path, options, inputs, size):
    case = Case(options, inputs)
    alignment, radius = case.context
    overlap = -(-radius // alignment) * alignment
    engine = case.engine(2 * overlap + 2 * alignment, overlap)
    labels, probabilities, _ = maps(case, engine, write_scene(tmp_path / "in", *size), tmp_path / "out")
    same_map(labels, probabilities, *case.whole(images(case, *size)))


def test_less_overlap_than_the_radius_is_close_but_not_the_same(fcn, tmp_path):
    paths = write_scene(tmp_path / "in", 203, 170)
    _, probabilities, _ = maps(fcn, fcn.engine(64, 8), paths, tmp_path / "out")
    expected, seen = fcn.whole(images(fcn, 203, 170))
    apart = np.abs(probabilities - expected)[seen]
    assert apart.max() > 1e-3
    assert apart.mean() < 0.05


def test_windows_share_the_statistics_of_their_scene(tmp_path):
    case = Case(SMALL, Inputs(modalities=("sar", "optical"), normalisation="tile"))
    paths = write_scene(tmp_path / "in", 203, 170)
    labels, probabilities, _ = maps(case, case.engine(96, 32), paths, tmp_path / "out")
    same_map(labels, probabilities, *case.whole(images(case, 203, 170)))
    alone = case.engine(96, 32)._replace(by_scene=False)
    _, probabilities, _ = maps(case, alone, paths, tmp_path / "other")
    expected, seen = case.whole(images(case, 203, 170))
    assert np.abs(probabilities - expected)[seen].max() > 1e-3, "each window by itself gives another map"


@pytest.mark.parametrize("size", [(130, 118), (75, 160)])
def test_the_eight_symmetries(fcn, tmp_path, size):
    import jax

    apply = jax.jit(over_symmetries(fcn.probabilities))
    engine = fcn.engine(96, 32, apply=apply)
    labels, probabilities, _ = maps(fcn, engine, write_scene(tmp_path / "in", *size), tmp_path / "out")

    def by_hand(batch):
        def turn(x, flips, transposed, h=2):
            x = np.swapaxes(x, h, h + 1) if transposed else x
            return np.flip(x, [h + i for i in range(2) if flips[i]])

        total = 0
        for flips in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for transposed in (False, True):
                turned = {k: turn(np.asarray(v), flips, transposed) for k, v in batch.items()}
                out = np.flip(np.asarray(fcn.probabilities(turned)), [1 + i for i in range(2) if flips[i]])
                total = total + (np.swapaxes(out, 1, 2) if transposed else out) / 8
        return total

    expected, seen = fcn.whole(images(fcn, *size), by_hand)
    same_map(labels, probabilities, expected, seen)
    plain, _ = fcn.whole(images(fcn, *size))
    assert np.abs(plain - expected).max() > 1e-3


def test_a_sensor_may_be_missing_in_places(tmp_path):
    case = Case(SMALL, BOTH)
    paths = write_scene(tmp_path / "in", 64, 80)
    sar, optical = pixels(64, 80, 1), pixels(64, 80, 2)
    optical[:, 40:] = 0
    sar[40:, :30] = 0
    for name, image in (("sar", sar), ("optical", optical)):
        raster.write(paths[name], image, nodata=0, **PLACE)
    labels, probabilities, _ = maps(case, case.engine(96, 32), paths, tmp_path / "out")
    same_map(labels, probabilities, *case.whole({"sar": sar[None], "optical": optical[None]}))
    assert (labels[20:30, 50:] != 255).all(), "radar saw it"
    assert (labels[50:, :20] != 255).all(), "the other one saw it"


@pytest.mark.parametrize("dates", ["all", (1,)])
def test_dates(tmp_path, dates):
    inputs = Inputs(modalities=("sar",), dates=dates, normalisation="tile", date_difference=dates == "all")
    case = Case(SMALL, inputs, dataclasses.replace(SPEC, dates=2))
    both = np.stack([pixels(130, 110, 1, seed) for seed in (0, 1)])
    both[0, :20] = 0
    both[1, 10:40] = 0
    (tmp_path / "in").mkdir()
    paths = [raster.write(tmp_path / "in" / f"{t}.tif", image, nodata=0) for t, image in enumerate(both)]
    labels, probabilities, _ = maps(case, case.engine(96, 32), {"sar": f"{paths[0]}+{paths[1]}"}, tmp_path / "out")
    if dates != "all":
        both[0] = 0
    same_map(labels, probabilities, *case.whole({"sar": both}))
    assert ((labels[12:18] == 255).all(), (labels[25:35, 40:] == 255).any()) == (True, dates != "all")


def test_nan_is_no_data(fcn, tmp_path):
    sar = dataclasses.replace(SPEC.modality("sar"), dtype="float32")
    case = Case(SMALL, spec=dataclasses.replace(SPEC, modalities=(sar, SPEC.modalities[1])))
    image = pixels(70, 90, 1).astype(np.float32)
    image[image == 0], image[3, 80], image[30:32] = np.nan, np.inf, np.nan
    (tmp_path / "in").mkdir()
    paths = {"sar": raster.write(tmp_path / "in" / "sar.tif", image)}
    labels, probabilities, _ = maps(case, case.engine(96, 32), paths, tmp_path / "out")
    same_map(labels, probabilities, *case.whole({"sar": np.where(np.isfinite(image), image, 0)[None]}))
    assert labels[3, 80] == 255


def test_windows_that_saw_nothing_are_not_computed(fcn, tmp_path):
    image = np.zeros((300, 300, 1), np.uint8)
    image[250:, 130:260] = pixels(50, 130, 1, 3)
    (tmp_path / "in").mkdir()
    paths = {"sar": raster.write(tmp_path / "in" / "sar.tif", image, nodata=0)}
    calls = []

    def apply(batch):
        calls.append(batch["sar_valid"].any((1, 2, 3)).sum())
        return fcn.probabilities(batch)

    said = []
    engine = fcn.engine(96, 32, rows=4, apply=apply)
    progress = {"progress": lambda *x: said.append(x)}
    labels, probabilities, mapped = maps(fcn, engine, paths, tmp_path / "out", **progress)
    same_map(labels, probabilities, *fcn.whole({"sar": image[None]}))
    windows = len(said)
    assert said[-1] == ("sar", windows, windows)
    assert len(calls) < windows / 8
    assert mapped.no_data + sum(mapped.classes) == 90_000
    nothing = raster.write(tmp_path / "in" / "sar.tif", np.zeros_like(image), nodata=0)
    labels, probabilities, mapped = maps(fcn, engine, {"sar": nothing}, tmp_path / "out")
    assert (labels == 255).all()
    assert np.isnan(probabilities).all()
    assert mapped == ((0, 0, 0), 90_000)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_the_files_say(fcn, tmp_path):
    from rasterio.control import GroundControlPoint

    paths = write_scene(tmp_path / "in", 70, 300)
    maps(fcn, fcn.engine(96, 32), paths, tmp_path / "out", tags={"SARJAX": "map"})
    import rasterio

    with rasterio.open(tmp_path / "out" / "m.tif") as f:
        assert (f.crs, f.transform) == (PLACE["crs"], PLACE["transform"])
        assert (f.nodata, f.count, f.dtypes, f.shape) == (255, 1, ("uint8",), (70, 300))
        assert [f.colormap(1)[i][:3] for i in range(3)] == list(SPEC.palette)
        assert f.tags()["SARJAX"] == "map"
    with rasterio.open(tmp_path / "out" / "p.tif") as f:
        assert np.isnan(f.nodata)
        assert f.descriptions == SPEC.class_names
        assert (f.count, f.dtypes[0], f.crs) == (3, "float32", PLACE["crs"])

    points = [GroundControlPoint(r, c, 10.0 + c / 9, 50.0 - r / 9) for r, c in ((0, 0), (0, 299), (69, 0), (69, 299))]
    raster.write(paths["sar"], pixels(70, 300, 1), nodata=0)
    with rasterio.open(paths["sar"], "r+") as f:
        f.gcps = points, PLACE["crs"].from_epsg(4326)
    maps(fcn, fcn.engine(96, 32), paths, tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "m.tif") as f:
        kept, crs = f.gcps
        assert crs.to_epsg() == 4326
        assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]


@pytest.mark.parametrize("where", ["reading", "device", "writing"])
def test_a_failure_leaves_nothing_behind(fcn, tmp_path, monkeypatch, where):
    paths = write_scene(tmp_path / "in", 300, 300)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.tif").write_bytes(b"older")
    engine, calls = fcn.engine(96, 32, rows=1), []

    def failing(work, after=20):
        def call(*args):
            calls.append(1)
            if len(calls) > after:
                raise UserError("the disk is gone.")
            return work(*args)

        return call

    if where == "device":
        engine = engine._replace(apply=failing(engine.apply))
    else:
        kind, name = {"reading": (raster.Reader, "read"), "writing": (raster.Writer, "write")}[where]
        monkeypatch.setattr(kind, name, failing(getattr(kind, name)))
    with pytest.raises(UserError, match="the disk is gone"):
        map_scene(engine, scene_of(fcn, paths), tmp_path / "out" / "m.tif", tmp_path / "out" / "p.tif")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.tif"]
    assert (tmp_path / "out" / "m.tif").read_bytes() == b"older"
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("reader", "writer"))]


def test_a_full_disk_is_named(fcn, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    (tmp_path / "out").mkdir()
    paths = write_scene(tmp_path / "in", 300, 300)
    with pytest.raises(UserError, match=r"cannot write to .*out: No space left"):
        map_scene(fcn.engine(96, 32), scene_of(fcn, paths), tmp_path / "out" / "m.tif")
    with pytest.raises(UserError, match=r"cannot write to .*gone"):
        map_scene(fcn.engine(96, 32), scene_of(fcn, paths), tmp_path / "gone" / "m.tif")


def test_reading_device_and_writing_overlap(fcn, tmp_path):
    """While the device works on one batch, the next windows are read, but only so many; they come in order."""
    paths = write_scene(tmp_path / "in", 600, 600)
    reader_read, given = raster.Reader.read, []
    with pytest.MonkeyPatch.context() as patch:
        reads = []
        patch.setattr(raster.Reader, "read", lambda self, w=None: reads.append(w) or reader_read(self, w))

        def apply(batch):
            given.append(len(reads))
            return fcn.probabilities(batch)

        (tmp_path / "out").mkdir()
        map_scene(fcn.engine(96, 32, rows=2, apply=apply), scene_of(fcn, paths), tmp_path / "out" / "m.tif")
    ahead = np.array(given) - 2 * np.arange(1, len(given) + 1)
    assert ahead.max() <= 2 * 2 + 2, "bounded"
    assert [w[:2] for w in reads] == sorted(w[:2] for w in reads)
