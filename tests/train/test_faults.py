"""Runs that die: killed, stopped, with damaged checkpoints. What they end with is what an undisturbed run ends with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sarjax.train.checkpoint import Checkpoints

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEPS = 14


def start(workdir, pause=0.0, devices=2, member=(), method="toy", prefetch=1, die_saving=0):
    """The sarjax of this checkout, and what else the environment names."""
    paths = [str(ROOT), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "METHOD": method,
        "PREFETCH": str(prefetch),
        "DIE_SAVING": str(die_saving),
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(HERE / "run_toy.py"), *map(str, (workdir, STEPS, pause, devices, *member))]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_for_step(workdir, step, process):
    for _ in range(3000):
        if any(row["step"] >= step for row in rows(workdir)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


def final(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    assert checkpoints.fault(STEPS) is None
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), checkpoints.stored(STEPS)
    )
    return checkpoints.restore_step(STEPS, stored)[0]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, err = finish(start(workdir))
    assert code == 0, err
    assert f"sarjax is {ROOT / 'sarjax' / '__init__.py'}" in err
    return workdir


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_like(workdir, undisturbed):
    assert_same(final(workdir), final(undisturbed))
    assert rows(workdir) == rows(undisturbed), "no row is missing or doubled"


def test_killed_and_resumed_is_bit_identical(undisturbed, tmp_path):
    """Twice, in mid-epoch and after a refresh of the partner table; the state and every logged number agree."""
    workdir = tmp_path / "killed"
    for strike in (4, 9):
        process = start(workdir, pause=0.15)
        wait_for_step(workdir, strike, process)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
    code, err = finish(start(workdir))
    assert code == 0, err
    assert "resuming at step" in err
    assert "not bit-identical" not in err
    assert_like(workdir, undisturbed)


def test_neighbours_of_scene_clustering_survive_a_kill(tmp_path):
    """In mid-epoch, with a table in memory: the partners that follow are those of an undisturbed run.

    Neither is how far ahead it reads of any importance.
    """
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    code, err = finish(start(whole, method="scene_clustering", prefetch=4))
    assert code == 0, err
    table = np.asarray(final(whole)["memory"]["neighbours"])
    assert (table[:12] >= 0).all()
    process = start(workdir, pause=0.15, method="scene_clustering", prefetch=3)
    wait_for_step(workdir, 7, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, err = finish(start(workdir, method="scene_clustering"))
    assert code == 0, err
    assert "resuming at step" in err
    assert_like(workdir, whole)


def test_sigterm_saves_and_exits_0(undisturbed, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(workdir, pause=0.15)
    wait_for_step(workdir, 5, process)
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 0, err
    assert "stopped by signal after step" in err
    stopped_at = Checkpoints(workdir / "checkpoints", read_only=True).steps()[-1]
    assert stopped_at == rows(workdir)[-1]["step"] < STEPS
    code, err = finish(start(workdir))
    assert code == 0, err
    assert f"resuming at step {stopped_at}" in err
    assert_like(workdir, undisturbed)


def test_damaged_newest_checkpoint(undisturbed, tmp_path):
    workdir = tmp_path / "damaged run"
    process = start(workdir, pause=0.15)
    wait_for_step(workdir, 7, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    newest = Checkpoints(workdir / "checkpoints", read_only=True).steps()[-1]
    victim = max(
        (p for p in (workdir / "checkpoints" / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 64
    victim.write_bytes(data)
    code, err = finish(start(workdir))
    assert code == 0, err
    assert f"checkpoints/{newest} is damaged" in err
    assert_like(workdir, undisturbed)


def test_killed_while_a_checkpoint_is_written(undisturbed, tmp_path):
    """What is half-written is not taken for a checkpoint, and does not stay."""
    workdir = tmp_path / "killed"
    process = start(workdir, die_saving=8)
    assert finish(process)[0] == -signal.SIGKILL
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert "8.digests.json" not in left
    assert any(name.startswith("8") for name in left), "it had begun"
    code, err = finish(start(workdir))
    assert code == 0, err
    assert_like(workdir, undisturbed)
    assert not [path for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name]


def test_one_of_two_processes_is_killed(tmp_path):
    """In mid-step. The other ends too, with an error; both together then come to the end that they would have.

    What was last saved had no time to be finished: both leave it, and save that step again.
    """

    def both(workdir, pause=0.0):
        port = free_port()
        return [start(workdir, pause, devices=1, member=(p, 2, port)) for p in range(2)]

    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    ends = [finish(process) for process in both(whole)]
    assert [code for code, _ in ends] == [0, 0], ends
    first, second = both(workdir, pause=0.15)
    wait_for_step(workdir, 7, first)
    second.send_signal(signal.SIGKILL)
    assert finish(second)[0] == -signal.SIGKILL
    assert finish(first)[0] not in (0, None)
    newest = Checkpoints(workdir / "checkpoints", read_only=True).steps()[-1]
    assert newest < STEPS
    (workdir / "checkpoints" / f"{newest}.digests.json").unlink(missing_ok=True)
    ends = [finish(process) for process in both(workdir)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"checkpoints/{newest} is damaged: it was never finished" in ends[0][1]
    assert "damaged" not in ends[1][1], "one of them talks"
    assert "not bit-identical" not in ends[0][1]
    assert_like(workdir, whole)


def test_two_processes_train_what_one_does(undisturbed, tmp_path):
    """Two processes of one device each, over jax.distributed: stopped together, resumed by one process of two."""
    workdir, port = tmp_path / "shared", free_port()
    both = [start(workdir, pause=0.2, devices=1, member=(p, 2, port)) for p in range(2)]
    wait_for_step(workdir, 5, both[0])
    for process in both:
        process.send_signal(signal.SIGTERM)
    ends = [finish(process) for process in both]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "stopped by signal" in ends[0][1]
    assert "step 5/" not in ends[1][1], "one of them talks"
    code, err = finish(start(workdir))
    assert code == 0, err
    assert "not bit-identical" in err
    assert "processes: 2 -> 1" in err
    for name in ("params", "memory"):
        for a, b in zip(jax.tree.leaves(final(workdir)[name]), jax.tree.leaves(final(undisturbed)[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert [r["step"] for r in rows(workdir)] == [r["step"] for r in rows(undisturbed)]
