"""Processes that make maps and are stopped: what they leave, and what a second one says."""

import os
import signal
import subprocess
import sys

import pytest
from scenes.scene_files import pixels, predict, stamps, trained

from sarjax import raster
from sarjax.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def started(run, scene, out):
    """A process in the midst of a scene of some 5,000 windows."""
    command = [sys.executable, "-m", "sarjax", "predict", run, scene, "--out", out, "--probabilities"]
    command += ["--window", 68, "--overlap", 32, "--batch", 1]
    process = subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    said = ""
    while "predict big: " not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return process


@pytest.mark.timeout(300)
def test_killed_and_terminated(run, tmp_path):
    (tmp_path / "in").mkdir()
    big = raster.write(tmp_path / "in" / "big.tif", pixels(400, 400, 1), nodata=0)
    small = raster.write(tmp_path / "in" / "small.tif", pixels(90, 90, 1), nodata=0)
    out = tmp_path / "out"
    predict(run, [small], out)
    before = stamps(out)

    process = started(run, big, out)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.stderr.close()
    left = set(stamps(out)) - set(before)
    assert left == {".sarjax-predict"}, "nothing half-made has a name of its own"

    process = started(run, big, out)
    (work,) = (p for p in (out / ".sarjax-predict").iterdir() if p.is_dir())  # and that of the killed one is gone
    with pytest.raises(UserError, match=r"another call is making maps in .*out: wait for it, or use another --out"):
        predict(run, [small], out, overwrite=True)
    predict(run, [small], out)  # is there already
    assert work.is_dir()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(60) == 143, said
    process.stderr.close()
    assert said.strip().splitlines()[-1] == "sarjax: stopped by signal; the same command goes on from there"
    assert "Traceback" not in said
    assert stamps(out) == before
    predict(run, [big], out, overlap=8)
    assert sorted(set(stamps(out)) - set(before)) == ["big.json", "big.png", "big.tif"]
