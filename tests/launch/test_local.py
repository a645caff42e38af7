"""launch/local.py for real: processes that find each other, train as one, and end together."""

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

from sarjax.config import Mesh
from sarjax.train.mesh import make_mesh
from sarjax.train.run import restore_run

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "launch" / "local.py"
PYTHON = [sys.executable, "-c"]


def environment():
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def launch(processes, logs, *command):
    return subprocess.Popen(
        [
            sys.executable,
            LOCAL,
            "-n",
            str(processes),
            "--cpu",
            "--grace",
            "2",
            "--logs",
            logs,
            "--",
            *map(str, command),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def log(logs, process):
    return said((logs / f"process-{process}.log").read_text())


def said(text):
    """What is ours: gloo says whom it has found."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


def wait_for(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("never came")


def test_four_add_up(tmp_path):
    script = """
from sarjax.cli.distributed import ending_all, join
place, say = join("auto")
with ending_all(place):
    import jax
    import numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    from sarjax.train.mesh import make_mesh, put_batch
    from sarjax.config import Mesh
    rows = put_batch(make_mesh(Mesh()), np.full((2, 3), 10.0**place.process))
    say(f"{place.here} here, {jax.device_count()} devices: {float(jax.jit(lambda x: x.sum())(rows))}")
"""
    code, out, err = ended(launch(4, tmp_path, *PYTHON, script))
    assert code == 0, err
    first, second = said(out)
    assert first.startswith("distributed: process 0 of 4, coordinator 127.0.0.1:")
    assert second == "4 here, 8 devices: 6666.0"
    assert log(tmp_path, 1) == [], "one of them talks"


def test_one_that_fails_ends_all(tmp_path):
    script = """
import os, signal, sys, time
if os.environ["JAX_PROCESS_ID"] == "1":
    print("what went wrong")
    sys.exit(7)
if os.environ["JAX_PROCESS_ID"] == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
    code, _, err = ended(launch(3, tmp_path, *PYTHON, script))
    assert code == 7
    assert "process 1 of 3 ended with exit code 7" in err
    assert err.splitlines()[-1] == "  what went wrong"


def test_a_killed_one_ends_all(tmp_path):
    script = "import os, time\nif os.environ['JAX_PROCESS_ID'] == '0': os.kill(os.getpid(), 9)\ntime.sleep(600)"
    code, _, err = ended(launch(2, tmp_path, *PYTHON, script))
    assert code == 128 + signal.SIGKILL
    assert "process 0 of 2 ended by SIGKILL" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_as_sigterm(tmp_path, number):
    script = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
print("ready")
time.sleep(600)
"""
    process = launch(2, tmp_path, *PYTHON, script)
    logs = [tmp_path / f"process-{i}.log" for i in range(2)]
    wait_for(lambda: all(path.exists() and "ready" in path.read_text() for path in logs), process)
    process.send_signal(number)
    code, out, err = ended(process, seconds=300)
    assert code == 0, err
    assert out.split() == ["ready", "saved"]
    assert log(tmp_path, 1) == ["ready", "saved"]


def test_shares_of_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    command = [sys.executable, LOCAL, "-n", "2", "--logs", tmp_path, "--", *PYTHON]
    print_it = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    subprocess.run([*command, print_it], check=True, capture_output=True)
    assert [log(tmp_path, i) for i in range(2)] == [["4,5"], ["6,7"]]
    command[3] = "3"
    done = subprocess.run([*command, print_it], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "3 processes cannot share 4 GPUs equally" in done.stderr


def test_an_error_of_the_first_alone_ends_the_others(tmp_path):
    """Without a launcher that would kill them: as where a run's directory cannot be written."""
    script = """
from sarjax.cli.distributed import ending_all, join
from sarjax.errors import UserError
place, say = join("on")
with ending_all(place):
    if place.process == 0:
        raise UserError("no room.")
    from sarjax.train.run import sync
    sync("claimed")
"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [*PYTHON, script],
            env=environment()
            | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    (code, _, err), (other, _, _) = (ended(process, seconds=300) for process in processes)
    assert code == 2
    assert err.splitlines()[-1] == "sarjax, process 0 of 2: no room."
    assert other != 0


SHRINK = [
    *("--network", "fcn", "--network.stages", "1", "--network.width", "0.0625", "--augment.crop", "32"),
    *("--batch-size", "4", "--steps", "3", "--optimizer.name", "sgd", "--no-tensorboard", "--log-every", "1"),
]


def final(workdir):
    """As any later verb reads it, in one process on one device."""
    run = restore_run(workdir, make_mesh(Mesh(1, 1, 1)), checkpoint="last")
    assert run.step == 3
    return jax.tree.leaves((run.params, run.stats))


def test_two_train_what_one_does(fake_records, tmp_path):
    """Two processes of one device each end with the parameters of one process of two, and go on where they stopped."""
    for name, processes in (("one", 1), ("two", 2)):
        train = [sys.executable, "-m", "sarjax", "train", "ombria_s1", "--workdir", tmp_path / name, *SHRINK]
        train += ["--data-dir", fake_records, "--host-devices", 2]
        code, out, err = ended(launch(processes, tmp_path / f"logs {name}", *train))
        assert code == 0, err
    assert "distributed: process 0 of 2, coordinator 127.0.0.1:" in out
    assert "step 3/3" in out
    assert log(tmp_path / "logs two", 1) == []
    for a, b in zip(*(final(tmp_path / name) for name in ("one", "two")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    code, out, err = ended(launch(2, tmp_path / "logs again", *train[:-2], "--extend-steps", 4))
    assert code == 0, err
    assert "resuming at step 3" in out
    assert "not bit-identical" not in out
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["host_devices"] == 2, "of all processes"
    assert [(s["step"], s["processes"], s["devices"]) for s in manifest["starts"]] == [(0, 2, 2), (3, 2, 2)]
