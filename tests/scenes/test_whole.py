"""A scene mapped at once, in strips over devices, is the map of the whole image, and says what it takes."""

import functools
import json
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scenes.scene_files import PLACE, SPEC, Case, pixels, predict, same_map, trained, write_scene

from sarjax import raster
from sarjax.config import Inputs, Mesh
from sarjax.errors import UserError
from sarjax.options import FCN
from sarjax.scenes import whole as module
from sarjax.scenes.inputs import parse_scenes
from sarjax.scenes.whole import Footprint, Whole, lay, map_whole, what_fits
from sarjax.train.mesh import make_mesh

SMALL = FCN(width=1 / 16, stages=1)  # alignment 4, radius 30
SIZE = (150, 170)


def whole_of(case, devices):
    mesh = make_mesh(Mesh(1, 1, devices), jax.devices()[:devices])
    by_scene = case.inputs.normalisation == "tile"
    # The softmax of these is what `case` calls probabilities.
    logits = lambda params, stats, batch: jnp.log(case.probabilities(batch))  # noqa: E731
    return Whole(logits, ({}, {}), case.reads, case.context, mesh, by_scene=by_scene, window=96)


def maps(case, devices, paths, out, **options):
    out.mkdir(exist_ok=True)
    (scene,) = parse_scenes([",".join(f"{m}={paths[m]}" for m in case.reads.modalities)], case.reads)
    mapped = map_whole(whole_of(case, devices), scene, out / "m.tif", out / "p.tif", **options)
    return raster.read(out / "m.tif")[..., 0], raster.read(out / "p.tif"), mapped


def images(case, height, width, seed=0):
    return {m: pixels(height, width, len(SPEC.modality(m).bands), seed)[None] for m in case.reads.modalities}


@functools.cache
def small():
    return Case(SMALL)


@settings(max_examples=4, deadline=None)
@given(st.tuples(st.integers(1, 300), st.integers(1, 90)), st.sampled_from([1, 2, 3, 8]))
@example((3, 50), 8)
@example((290, 33), 3)
def test_whatever_the_size(size, devices):
    """Strips of any height, blocks of the file across strips, and devices that hold nothing of the scene."""
    case = small()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_scene(Path(folder) / "in", *size)
        labels, probabilities, mapped = maps(case, devices, paths, Path(folder) / "out")
    expected, seen = case.whole(images(case, *size))
    np.testing.assert_array_equal(np.isnan(probabilities).any(-1), ~seen)
    np.testing.assert_array_equal(labels == 255, ~seen)
    np.testing.assert_allclose(probabilities[seen], expected[seen], atol=1e-5)
    assert mapped.no_data == (~seen).sum()
    assert list(mapped.classes) == np.bincount(labels[seen], minlength=3).tolist()


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (Inputs(modalities=("sar", "optical"), normalisation="tile"), (325, 70)),
        (Inputs(modalities=("optical",), local_mean=11), (130, 201)),
    ],
    ids=["by_scene", "local_mean"],
)
def test_other_inputs(tmp_path, inputs, size):
    case, told = Case(SMALL, inputs), []
    progress = {"progress": lambda *x: told.append(x)}
    labels, probabilities, _ = maps(case, 4, write_scene(tmp_path / "in", *size), tmp_path / "out", **progress)
    same_map(labels, probabilities, *case.whole(images(case, *size)))
    blocks = -(-size[0] // 256)
    assert told[-1][1:] == (blocks, blocks)
    assert [t for t in told if t[0].endswith("reading")][-1][1:] == (4, 4)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    paths = write_scene(tmp_path / "in", 300, 60)
    write, calls = raster.Writer.write, []

    def failing(*args):
        calls.append(1)
        if len(calls) > 2:
            raise UserError("the disk is gone.")
        return write(*args)

    monkeypatch.setattr(raster.Writer, "write", failing)
    with pytest.raises(UserError, match="the disk is gone"):
        maps(small(), 2, paths, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("reader", "writer"))]


# --- Memory


def test_the_layout():
    assert lay(3704, 5556, 32, 4) == (3704, 5556, 3712, 5568, 4, 928)
    assert lay(3704, 5556, 32, 8).depth == 480, "padded to 3840 rows"
    assert lay(5, 3, 4, 8) == (5, 3, 8, 4, 8, 4)
    for n in range(1, 9):
        found = lay(1001, 10, 32, n)
        assert found.padded >= found.rows == 1024
        assert found.depth % 32 == 0
        assert found.padded - found.rows < 32 * n


def test_what_would_fit():
    """A scene of 1024 x 1000 pixels at 1000 bytes each, and 100 parameters."""
    layout = lay(1000, 1000, 32, 1)
    taken = Footprint(100, 1000 * layout.depth * layout.columns, layout.depth * layout.columns)

    def fits(memory, devices=8, window=256):
        return what_fits(taken, layout, 32, window, memory if callable(memory) else lambda n: memory, devices)

    per_row = 1000 * 1024
    assert fits(100 + 512 * per_row) == (
        "by estimate, --mesh.space 2 or windows of 256 pixels without --mesh.space would fit"
    )
    assert "--mesh.space 3 or" in fits(100 + 352 * per_row)
    assert "--mesh.space 4 or" in fits(99 + 352 * per_row)
    assert fits(100 + 100 * per_row, devices=4).startswith("by estimate, windows of 256"), "more devices than there are"
    assert fits(100 + 1000 * 70**2) == "by estimate, --window 64 without --mesh.space would fit"
    assert fits(50) == "not even a small window would fit"
    # Devices that share one memory: more of them do not help.
    assert "--mesh.space" not in fits(lambda n: 900 * per_row // n).replace("without --mesh.space", "")


def test_a_scene_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    case, said = small(), []
    paths = write_scene(tmp_path / "in", 200, 100)
    monkeypatch.setattr(module, "available_memory", lambda: 500_000)
    with pytest.raises(UserError) as e:
        maps(case, 2, paths, tmp_path / "out", say=said.append)
    assert "sar would take 0.00" in str(e.value)
    assert "on each of 2 devices, of which each has 0.00 GiB: by estimate, " in str(e.value)
    assert said[0].startswith("sar: one image of 100 x 200 pixels on 2 devices, 0.00 GiB each by the compiler's count")
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.setattr(module, "available_memory", lambda: None)
    maps(case, 2, paths, tmp_path / "out")


# --- A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def test_a_run_maps_a_scene_at_once(run, tmp_path):
    scene = write_scene(tmp_path / "in", *SIZE)["sar"]
    predict(run, [scene], tmp_path / "windows", probabilities=True)
    whole = {"window": 0, "overlap": None}
    (record,), said = predict(run, [scene], tmp_path / "whole", probabilities=True, space=3, **whole)
    assert "sar: one image of 172 x 152 pixels on 3 devices" in said
    for name, atol in (("sar_probabilities.tif", 1e-5), ("sar.tif", 0)):
        by_windows, at_once = (raster.read(tmp_path / out / name) for out in ("windows", "whole"))
        if atol:
            np.testing.assert_allclose(at_once, by_windows, rtol=0, atol=atol)
            top = np.sort(np.nan_to_num(by_windows), -1)
            sure = (top[..., -1] - top[..., -2] > 1e-4) | np.isnan(by_windows[..., 0])
    np.testing.assert_array_equal(at_once[sure], by_windows[sure])
    assert sure.mean() > 0.9
    with raster.open_raster(tmp_path / "whole" / "sar.tif") as f:
        assert (f.info.georeference.crs, f.info.georeference.transform) == (PLACE["crs"], PLACE["transform"])
        assert f.info.no_data == 255
        assert "SARJAX_MAP" in f.tags()
    assert {k: record[k] for k in ("window", "overlap", "tta", "strips", "probabilities")} == {
        "window": "whole", "overlap": 0, "tta": False, "strips": 3, "probabilities": True
    }  # fmt: skip
    assert json.loads((tmp_path / "whole" / "sar.json").read_text()) == record
    _, said = predict(run, [scene], tmp_path / "whole", space=2, **whole)
    assert "there already" in said, "the number of devices does not matter to a map"
    with pytest.raises(UserError, match="was made with window whole, not 96: --overwrite"):
        predict(run, [scene], tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 96}, "--window is given beside --mesh.space, which maps a scene as one image"),
        ({"overlap": 0}, "--overlap is given beside"),
        ({"batch": 2}, "--batch is given beside"),
        ({"tta": True}, "--tta is given beside"),
        ({"space": 9}, "--mesh.space is 9; 1 to 8, the devices there are, or -1 for all"),
        ({"space": -2}, "--mesh.space is -2; 1 to 8"),
        ({"space": 0, "allow_global": True}, "--allow-global is given without --mesh.space"),
    ],
)
def test_what_contradicts_itself(run, tmp_path, options, message):
    given = {"window": 0, "overlap": None, "space": 2} | options
    with pytest.raises(UserError, match=message):
        predict(run, [tmp_path], tmp_path / "out", **given)
