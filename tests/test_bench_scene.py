"""The benchmark of whole scenes: every side makes the same map, says where its time goes, and bad input is refused."""

import importlib.util
import json

import numpy as np
import pytest
from verbs import fails, run

from sarjax import raster
from sarjax.bench import scene as bench
from sarjax.bench import scene_sides
from sarjax.bench.scene import make_scene, parse_size, same
from sarjax.bench.scene_sides import MAP, PROBABILITIES, SCENE, WEIGHTS, Task, save_weights
from sarjax.errors import UserError
from sarjax.scenes.stages import STAGES, Stages

pytestmark = pytest.mark.usefixtures("session_devices")
SMALL = ("--width", 0.0625, "--classes", 3, "--window", 896, "--repetitions", 1, "--devices", 2)


@pytest.fixture
def task(tmp_path):
    """Of a scene of 200 x 1300 pixels with its weights: 2 windows."""
    make_scene(tmp_path / SCENE, 200, 1300, striped=True)
    with raster.open_raster(tmp_path / SCENE) as f:
        image = f.read()
    image[100:150, 200:300] = 0
    raster.write(tmp_path / SCENE, image, nodata=0)
    save_weights(tmp_path / WEIGHTS, 0.0625, 3)
    (tmp_path / "out").mkdir()
    return Task("windows", str(tmp_path), "out", 200, 1300, 0.0625, 3, 896, 0, 2, False, False, False)


def test_every_side_makes_the_same_map(capsys):
    """In processes of their own: ours in windows and at once, and PyTorch's, with our weights."""
    pytest.importorskip("torch")
    run("bench", "scene", "200x1300", *SMALL, "--space", 2, "--no-compile", "--json")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    windows, whole, peer = found["rows"]
    assert [row["side"] for row in found["rows"]] == ["windows", "at once, 2 strips", "torch"]
    assert found["versions"]["torch"]
    for row in found["rows"]:
        # Of 260,000 pixels: those where two classes are as likely as each other to float32's last digits may differ.
        assert row["same"] > 0.9999, row
        assert row["seconds"]["n"] == 1
        assert row["megapixels_per_second"] == pytest.approx(0.26 / row["seconds"]["median"])
        assert row["times_ours"] == pytest.approx(row["seconds"]["median"] / windows["seconds"]["median"])
        assert row["peak_mb"] > row["added_mb"] >= 0
        assert all(0 < row[f"{stage}_s"] < row["seconds"]["median"] for stage in STAGES)
        assert row["slowest"] in STAGES
        assert 0 < row["busy"] <= 1
    assert windows["computed"] > whole["computed"] >= 1
    assert {windows[key] == peer[key] for key in ("window", "overlap", "windows", "computed")} == {True}
    assert whole["compiler_mb_per_device"] > 0


def test_what_else_maps_are_made_of(task):
    """Scenes in strips, normalisation by the scene, and probabilities; windows and at once."""
    about, work = scene_sides.windows(task)
    assert (about["windows"], about["devices"], about["batch"]) == (2, 2, 2)
    work(Stages())
    made = task.path("out")
    labels = raster.read(made / MAP)[..., 0]
    assert set(np.unique(labels)) == {0, 1, 2, 255}
    asked = task._replace(probabilities=True, by_scene=True)
    scene_sides.windows(asked)[1](Stages())
    by_scene, likely = raster.read(made / MAP)[..., 0], raster.read(made / PROBABILITIES)
    np.testing.assert_array_equal(by_scene == 255, labels == 255)
    assert 0.5 < (by_scene == labels).mean() < 1
    scene_sides.whole(asked._replace(side="whole"))[1](Stages())
    assert (raster.read(made / MAP)[..., 0] == by_scene).mean() > 0.9999
    np.testing.assert_allclose(raster.read(made / PROBABILITIES), likely, atol=1e-5)


def test_the_peer_writes_probabilities(task):
    pytest.importorskip("torch")
    from sarjax.bench.torch_scene import sliding_windows

    asked, made = task._replace(probabilities=True, batch=2), task.path("out")
    scene_sides.windows(asked)[1](Stages())
    labels, likely = raster.read(made / MAP), raster.read(made / PROBABILITIES)
    about, work = sliding_windows(asked._replace(side="torch"))
    assert about["batch"] == 2
    work(Stages())
    assert (raster.read(made / MAP) == labels).mean() > 0.9999
    np.testing.assert_allclose(raster.read(made / PROBABILITIES), likely, atol=1e-5)


def test_figures_alone(task):
    found, _ = scene_sides.whole(task._replace(side="whole", figures=True, devices=8))
    assert found["devices"] == 8
    assert found["computed"] == pytest.approx(8 * 32 * 1312 / (200 * 1300))
    assert found["compiler_mb_per_device"] > 0


def test_a_table_without_torch(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run("bench", "scene", "90x70", "--width", 0.0625, "--repetitions", 1)
    out, err = capsys.readouterr()
    assert "torch is not installed" in err
    rows = out.split("\n\n")[1].splitlines()
    assert rows[0].split()[:3] == ["size", "layout", "side"]
    assert [row.split()[3] for row in rows[1:]] == ["windows", "torch", "torch.compile"]


def test_the_share_of_equal_pixels(tmp_path):
    a = np.zeros((300, 10), np.uint8)
    b = a.copy()
    b[290:, :5] = 7
    assert same(raster.write(tmp_path / "a.tif", a), raster.write(tmp_path / "b.tif", b)) == 1 - 50 / 3000


def test_sizes():
    assert parse_size("12x34") == (12, 34, False)
    assert parse_size("12X34:striped") == (12, 34, True)
    for odd in ("12", "12x", "0x3", "1x2:lzw", "1x2:", "-4x9"):
        with pytest.raises(UserError, match="HEIGHTxWIDTH"):
            parse_size(odd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("1024",), "size '1024' is not understood: HEIGHTxWIDTH or HEIGHTxWIDTH:striped"),
        (("90x70", "--repetitions", 0), "repetitions is 0; a whole number from 1"),
        (("90x70", "--space", 0), "space is 0; a number of strips from 1"),
        (("90x70", "--width", 0), "width is 0.0; a number above 0"),
        (("90x70", "--classes", 256), "classes is 256; a number of classes from 1 to 254"),
        (("90x70", "--devices", -1), "devices is -1; a number of devices from 1"),
    ],
)
def test_bad_input(capsys, options, message):
    assert message in fails(capsys, "bench", "scene", *options)


def test_a_side_that_fails_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"^--window is 100, but this network needs a multiple of 32, such as 96\.$"):
        bench.bench_scene(["90x70"], width=0.0625, window=100, peers=(), repetitions=1, say=lambda line: None)
    monkeypatch.setattr(bench, "save_weights", lambda path, *_: None)
    with pytest.raises(UserError, match=r"measures windows ended with code 1: FileNotFoundError"):
        bench.bench_scene(["90x70"], width=0.0625, peers=(), repetitions=1, say=lambda line: None)
    with pytest.raises(UserError, match=r"peer 'tensorflow' is not known; torch and torch.compile are"):
        bench.bench_scene(["90x70"], peers=("tensorflow",))
