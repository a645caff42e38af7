"""`predict_run`: maps of scenes from a run's directory, made once, and never over what is not ours."""

import json
import os

import jax
import numpy as np
import pytest
from PIL import Image
from scenes.scene_files import PLACE, SPEC, pixels, predict, quiet, stamps, trained, write_scene

from sarjax import raster
from sarjax.config import Augment, Inputs, Mesh
from sarjax.errors import UserError
from sarjax.methods.record import Head
from sarjax.models.context import FieldOfView
from sarjax.reports.makers import choose_windows, reads_of
from sarjax.scenes.windows import Windows
from sarjax.train.mesh import make_mesh
from sarjax.train.run import restore_run

SIZE = (150, 170)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "in", *SIZE)


def whole(run, images, head="main"):
    """(probabilities, seen) of whole-image inference by the run's head."""
    restored = restore_run(run, make_mesh(Mesh(), jax.devices()[:1]), say=quiet)
    batch = {}
    for name, image in images.items():
        batch |= {name: image[None, None], f"{name}_valid": (image != 0).any(-1).astype(np.uint8)[None, None]}
    pad = {k: np.pad(v, [(0, -n % 4 if i in (2, 3) else 0) for i, n in enumerate(v.shape)]) for k, v in batch.items()}
    logits = restored.method.heads[head].predict(restored.params, restored.stats, pad)
    seen = np.any([batch[f"{name}_valid"][0, 0] for name in images], 0)
    return np.asarray(jax.nn.softmax(logits, -1))[0, : SIZE[0], : SIZE[1]], seen


def test_what_is_made(run, scene, tmp_path):
    out, done = tmp_path / "new" / "out", []
    records, said = predict(run, [scene["sar"]], out, probabilities=True, batch=1, progress=lambda *x: done.append(x))
    assert sorted(p.name for p in out.iterdir()) == ["sar.json", "sar.png", "sar.tif", "sar_probabilities.tif"]
    labels, probabilities = raster.read(out / "sar.tif")[..., 0], raster.read(out / "sar_probabilities.tif")
    expected, seen = whole(run, {"sar": pixels(*SIZE, 1)})
    np.testing.assert_allclose(probabilities[seen], expected[seen], atol=1e-5)
    np.testing.assert_array_equal(labels == 255, ~seen)
    assert (labels[seen] == expected[seen].argmax(-1)).mean() > 0.99
    (record,) = records
    assert json.loads((out / "sar.json").read_text()) == record
    assert record["pixels"] == {n: int((labels == i).sum()) for i, n in enumerate(SPEC.class_names)}
    assert record["no_data_pixels"] == (~seen).sum()
    assert sum(record["share"].values()) == pytest.approx(1)
    assert record["area_m2"] == {c: 100 * n for c, n in record["pixels"].items()}
    about = {"head": "main", "window": 96, "overlap": 32, "tta": False, "step": 2, "size": list(SIZE), "ema": False}
    assert {k: record[k] for k in about} == about
    assert record["inputs"][0]["file"] == str(scene["sar"])
    assert record["inputs"][0]["bytes"] == scene["sar"].stat().st_size
    assert done[-1][0] == "sar"
    assert done[-1][1] == done[-1][2] == len(done)
    assert "170 x 150 pixels" in said
    look = np.asarray(Image.open(out / "sar.png").convert("RGB"))
    assert look.std() > 20
    for colour in SPEC.palette[:2]:
        shown = (np.abs(look.astype(int) - colour).max(-1) < 3).sum()
        assert shown > 50, "in the map, or in the legend"


def test_a_map_is_made_once(run, scene, tmp_path):
    out = tmp_path / "out"
    predict(run, [scene["sar"]], out)
    before = stamps(out)
    records, said = predict(run, [scene["sar"]], out)
    assert "there already" in said
    assert stamps(out) == before
    assert records[0]["pixels"]

    def again(**options):
        nonlocal before
        _, said = predict(run, [scene["sar"]], out, **options)
        after = stamps(out)
        made = "there already" not in said
        assert made == (after["sar.tif"] != before["sar.tif"]) == (after["sar.json"] != before["sar.json"])
        before = after
        return made

    assert again(probabilities=True)
    assert not again(), "more than is asked for is there"
    assert "sar_probabilities.tif" in before
    assert again(overwrite=True)
    (out / "sar.png").unlink()
    assert again()
    (out / "sar.json").unlink()
    assert again(), "as after an interruption"
    raster.write(scene["sar"], 255 - pixels(*SIZE, 1), nodata=255, **PLACE)
    assert again()
    os.utime(scene["sar"], (1, 1))
    assert again()
    assert again(tta=True, overwrite=True)


def test_what_is_in_the_way(run, scene, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, data in (("sar.tif", b"mine"), ("sar.png", b"mine"), ("sar.json", b'{"mine": 1}')):
        (out / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} was not made by sarjax predict: another --out, or --overwrite"):
            predict(run, [scene["sar"]], out)
        assert [p.read_bytes() for p in out.iterdir()] == [data]
        (out / name).unlink()
    raster.write(out / "sar.tif", np.zeros((4, 4), np.uint8))
    predict(run, [scene["sar"]], out, overwrite=True)
    assert raster.size(out / "sar.tif")[:2] == SIZE

    before = scene["sar"].read_bytes()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"sar.tif is an input and would be written over: another --out"):
            predict(run, [scene["sar"]], scene["sar"].parent, **options)
    link = tmp_path / "linked"
    link.mkdir()
    os.link(scene["sar"], link / "sar.tif")
    with pytest.raises(UserError, match="is an input"):
        predict(run, [scene["sar"]], link, overwrite=True)
    assert scene["sar"].read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        predict(run, [scene["sar"]], tmp_path / "file")
    (tmp_path / "in" / "two").mkdir()
    for name in ("x.tif", "x_probabilities.tif"):
        raster.write(tmp_path / "in" / "two" / name, pixels(40, 40, 1))
    with pytest.raises(UserError, match=r"x_probabilities.tif would be written for scenes x and x_probabilities"):
        predict(run, [tmp_path / "in" / "two"], out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "man"}, "unknown head of .* 'man': did you mean 'main'"),
        ({"window": 97}, "--window is 97, but this network needs a multiple of 4"),
        ({"batch": -1}, "--batch is -1"),
        ({"ema": True}, "kept no running mean"),
    ],
)
def test_settings_that_do_not_fit(run, scene, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        predict(run, [scene["sar"]], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_all_scenes_are_looked_at_before_the_first_map(run, scene, tmp_path):
    bad = raster.write(tmp_path / "in" / "bad.tif", pixels(40, 40, 2))
    with pytest.raises(UserError, match=r"bad.tif has 2 bands"):
        predict(run, [scene["sar"], bad], tmp_path / "out")
    with pytest.raises(UserError, match=r"gone.tif does not exist"):
        predict(run, [scene["sar"], tmp_path / "gone.tif"], tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no run"):
        predict(tmp_path, [scene["sar"]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_normalised_by_tile_with_two_sensors(tmp_path):
    run = trained(tmp_path / "run", inputs=Inputs(modalities=("sar", "optical"), normalisation="tile"))
    paths = write_scene(tmp_path / "in", *SIZE)
    out = tmp_path / "out"
    predict(run, [f"sar={paths['sar']},optical={paths['optical']}"], out, probabilities=True, batch=2)
    expected, seen = whole(run, {m.name: pixels(*SIZE, len(m.bands)) for m in SPEC.modalities})
    labels, probabilities = raster.read(out / "sar.tif")[..., 0], raster.read(out / "sar_probabilities.tif")
    np.testing.assert_allclose(probabilities[seen], expected[seen], atol=1e-5)
    np.testing.assert_array_equal(labels == 255, ~seen)
    with pytest.raises(UserError, match="lacks optical"):
        predict(run, [paths["sar"]], out)


def test_default_windows(run):
    restored = restore_run(run, make_mesh(Mesh()), say=quiet)
    said = []
    assert choose_windows(run, restored, "main", 0, None, said.append) == Windows(1088, 32)
    assert not said
    assert choose_windows(run, restored, "main", 96, 8, said.append) == Windows(96, 8)
    assert "less than the 30 that this network looks: seams may show, which --overlap 32 would avoid" in said[0]
    assert choose_windows(run, restored, "main", 96, None, said.append) == Windows(96, 24)
    assert "windows of 96 pixels overlap by 24, less than the 30" in said[1]
    assert "which --window 128 without --overlap would avoid" in said[1]
    choose_windows(run, restored, "main", 64, 8, said.append)
    assert "which --window 128 without --overlap would avoid" in said.pop(), "64 pixels cannot overlap by 32"
    assert choose_windows(run, restored, "main", 128, None, said.append) == Windows(128, 32)
    assert len(said) == 2
    head = restored.method.heads["main"]._replace(context=FieldOfView(8, None))
    far = restored._replace(method=restored.method._replace(heads={"main": head}))
    assert choose_windows(run, far, "main", 0, None, quiet) == Windows(32, 8), "the tiles of the run"
    assert choose_windows(run.parent, far, "main", 0, None, quiet) == Windows(256, 64), "nobody noted the tiles"
    experiment = far.config.experiment
    crop = far.config.__class__("", experiment.__class__(augment=Augment(crop=48)))
    assert choose_windows(run, far._replace(config=crop), "main", 0, None, quiet) == Windows(48, 12)


def test_what_a_head_reads():
    pair = SPEC.__class__(SPEC.name, SPEC.modalities, SPEC.classes, 2)
    head = Head(("optical", "optical_valid", "sar", "sar_valid"), quiet, FieldOfView(1, 0))
    assert reads_of("main", head, Inputs(), pair)[1:] == (("sar", "optical"), (0, 1))
    assert reads_of("main", head, Inputs(dates=(1,)), pair).dates == (1,)
    with pytest.raises(UserError, match="head 'main' reads label, which no scene has"):
        reads_of("main", head._replace(requires=("sar", "sar_valid", "label")), Inputs(), pair)
