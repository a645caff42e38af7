"""The verbs before and after training: data check, data build's options, predict, export."""

import json
import os
import signal

import fake_data
import numpy as np
import pytest
import rasterio
from verbs import run

from sarjax import raster

pytestmark = pytest.mark.usefixtures("session_devices")


def fails(capsys, *args, code=2):
    """The one line that a user reads."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == code
    err = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("check ")]
    assert len(err) == (code == 2), err
    return err[0] if err else ""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("szenen und mehr") / "source"
    fake_data.write_whu(root)
    return root


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run("data", "build", "whu_opt_sar", "--source", source, "--out", root / "records", "--jobs", 2)
    run(
        *("train", "synthetic_sar", "--workdir", root / "run", "--data-dir", root / "records", "--steps", 2),
        *("--batch-size", 2, "--augment.crop", 64, "--network.width", 0.0625, "--mesh.data", 1, "--no-tensorboard"),
    )
    return root / "run"


def test_a_check_says_what_is_wrong_and_exits_with_1(source, tmp_path, capsys):
    capsys.readouterr()
    run("data", "check", "whu_opt_sar", "--source", source)
    assert "0 fatal problem(s)" in capsys.readouterr().out
    fake_data.write_whu(tmp_path / "s")
    (tmp_path / "s" / "sar" / fake_data.WHU_NAMES[1]).write_bytes(b"")
    with pytest.raises(SystemExit) as e:
        run("data", "check", "whu_opt_sar", "--source", tmp_path / "s", "--json")
    assert e.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fatal"]
    (problem,) = (p for p in report["problems"] if p["severity"] == "fatal")
    assert problem["kind"] == "unreadable"
    assert "is empty (0 bytes)" in problem["text"]
    (tmp_path / "out.txt").write_text(f"# mended later\n{fake_data.WHU_NAMES[1]}\n")
    run("data", "check", "whu_opt_sar", "--source", tmp_path / "s", "--exclude", tmp_path / "out.txt")
    assert "is not a folder" in fails(capsys, "data", "check", "whu_opt_sar", "--source", tmp_path / "gone")
    gone = fails(capsys, "data", "check", "whu_opt_sar", "--source", source, "--exclude", tmp_path / "gone.txt")
    assert "gone.txt" in gone
    (tmp_path / "out.txt").write_text("nobody\n")
    assert "nobody" in fails(
        capsys, "data", "check", "whu_opt_sar", "--source", source, "--exclude", tmp_path / "out.txt"
    )


def test_maps(trained, source, tmp_path, capsys):
    scene = source / "sar" / fake_data.WHU_NAMES[0]
    capsys.readouterr()
    run("predict", trained, scene, "--out", tmp_path / "maps", "--window", 256, "--overlap", 32, "--json")
    (about,) = json.loads(capsys.readouterr().out)
    assert (about["window"], about["overlap"], about["tta"]) == (256, 32, False)
    with rasterio.open(tmp_path / "maps" / scene.name) as f:
        labels = f.read(1)
    assert labels.shape == (530, 600)
    assert (labels[:20, :30] == 255).all(), "nothing was seen there"
    assert sum(about["pixels"].values()) + about["no_data_pixels"] == labels.size == 530 * 600
    assert about["no_data_pixels"] == (labels == 255).sum()
    assert (tmp_path / "maps" / scene.name).with_suffix(".png").is_file()
    run("predict", trained, scene, "--out", tmp_path / "maps", "--window", 256, "--overlap", 32)
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("predict", trained, scene, "--out", tmp_path / "maps", "--window", 128, "--overlap", 32)
    assert "was made with window 256, not 128: --overwrite makes it again" in capsys.readouterr().err
    run("predict", trained, scene, "--out", tmp_path / "tta", "--window", 256, "--overlap", 32, "--tta")
    with rasterio.open(tmp_path / "tta" / scene.name) as f:
        assert np.mean(f.read(1) == labels) > 0.3


def test_a_scene_at_once(trained, source, tmp_path, capsys):
    scene = source / "sar" / fake_data.WHU_NAMES[0]
    capsys.readouterr()
    run("predict", trained, scene, "--out", tmp_path / "whole", "--mesh.space", 2, "--json")
    printed = capsys.readouterr()
    (about,) = json.loads(printed.out)
    assert (about["window"], about["strips"]) == ("whole", 2)
    assert "one image of 608 x 544 pixels on 2 devices" in printed.err
    run("predict", trained, scene, "--out", tmp_path / "window")
    at_once, one_window = (raster.read(tmp_path / out / scene.name)[..., 0] for out in ("whole", "window"))
    np.testing.assert_array_equal(at_once == 255, one_window == 255)
    assert np.mean(at_once == one_window) > 0.999, "but for ties"
    message = fails(capsys, "predict", trained, scene, "--out", tmp_path / "no", "--mesh.space", 2, "--window", 256)
    assert "--window is given beside --mesh.space" in message
    assert not (tmp_path / "no").exists()


def test_windows_that_cannot_hold_the_radius(trained, source, tmp_path, capsys):
    scene = source / "sar" / fake_data.WHU_NAMES[0]
    assert "--overlap is -1, but" in fails(
        capsys, "predict", trained, scene, "--out", tmp_path / "maps", "--window", 256, "--overlap", -1
    )
    assert not (tmp_path / "maps").exists()
    run("predict", trained, scene, "--out", tmp_path / "maps", "--window", 256, "--json")
    printed = capsys.readouterr()
    (about,) = json.loads(printed.out)
    assert (about["window"], about["overlap"]) == (256, 64)
    assert "windows of 256 pixels overlap by 64, less than the 213 that this network looks" in printed.err
    assert "--window 896 without --overlap would avoid" in printed.err


def test_a_signal_ends_a_prediction_like_an_interruption(trained, source, tmp_path, capsys, monkeypatch):
    from sarjax.reports import maps

    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(maps, "look", stop)
    scene = source / "sar" / fake_data.WHU_NAMES[0]
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run("predict", trained, scene, "--out", tmp_path / "maps", "--window", 256, "--overlap", 32)
    assert e.value.code == 143
    assert "sarjax: stopped by signal; the same command goes on from there" in capsys.readouterr().err
    assert not any((tmp_path / "maps").iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_global_network_sees_windows_of_the_size_that_it_was_trained_on(trained, source, tmp_path, capsys):
    run(
        *("train", "synthetic_sar", "--workdir", tmp_path / "run", "--data-dir", trained.parent / "records"),
        *("--network.low-window", 0, "--network.high-window", 0, "--steps", 2, "--batch-size", 2),
        *("--augment.crop", 64, "--network.width", 0.0625, "--mesh.data", 1, "--no-tensorboard"),
    )
    capsys.readouterr()
    scene = source / "sar" / fake_data.WHU_NAMES[0]
    run("predict", tmp_path / "run", scene, "--out", tmp_path / "maps", "--probabilities", "--json")
    (about,) = json.loads(capsys.readouterr().out)
    assert (about["window"], about["overlap"]) == (64, 16)
    with rasterio.open(tmp_path / "maps" / f"{scene.stem}_probabilities.tif") as f:
        probabilities = f.read()
    seen = ~np.isnan(probabilities[0])
    assert seen.sum() == 530 * 600 - about["no_data_pixels"]
    np.testing.assert_allclose(probabilities.sum(0)[seen], 1, rtol=0, atol=1e-5)

    at_once = ("predict", tmp_path / "run", scene, "--out", tmp_path / "whole", "--probabilities", "--mesh.space", 2)
    message = fails(capsys, *at_once)
    assert "takes means of its whole image, and learnt them on tiles of 64 pixels" in message
    assert "--allow-global maps the scene at once nevertheless" in message
    run(*at_once, "--allow-global")
    one_window = ("--window", 608, "--overlap", 0)
    run("predict", tmp_path / "run", scene, "--out", tmp_path / "one", "--probabilities", *one_window)
    found = [raster.read(tmp_path / d / f"{scene.stem}_probabilities.tif") for d in ("whole", "one")]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_scenes_that_do_not_fit(trained, source, tmp_path, capsys):
    def refused(*args):
        message = fails(capsys, "predict", trained, *args, "--out", tmp_path / "maps")
        assert not (tmp_path / "maps").exists()
        return message

    assert "has 4 bands, but 1 of sar are expected" in refused(source / "optical" / fake_data.WHU_NAMES[0])
    fake_data.write_tiff(tmp_path / "wide.tif", np.ones((40, 50), np.uint16))
    assert "wide.tif holds uint16, but uint8 is expected for sar" in refused(tmp_path / "wide.tif")
    assert "gone.tif does not exist" in refused(tmp_path / "gone.tif")
    assert "--window is 100, but this network needs a multiple of 32, such as 96" in refused(
        source / "sar", "--window", 100
    )
    assert "holds no run" in fails(capsys, "predict", tmp_path / "no run", source / "sar", "--out", tmp_path / "maps")


def test_export(trained, tmp_path, capsys):
    capsys.readouterr()
    run("export", trained, tmp_path / "a.jaxexport", "--size", "64x96", "--batch", 2)
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.jaxexport")
    sidecar = json.loads((tmp_path / "a.jaxexport.json").read_text())
    assert sidecar["inputs"][0]["shape"] == [2, 1, 64, 96, 1]
    assert sidecar["versions"]["jax"]
    assert "--size is '64'" in fails(capsys, "export", trained, tmp_path / "b.jaxexport", "--size", "64")
    assert not (tmp_path / "b.jaxexport").exists()
