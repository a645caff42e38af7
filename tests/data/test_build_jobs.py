"""Building by several processes: the same records, and no worker that outlives the build."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import fake_data
import numpy as np
import pytest
from fake_data import contents

from sarjax.data.build import build
from sarjax.data.store import open_dataset
from sarjax.errors import UserError

# Says the workers' process ids and, having waited for the first rows, is killed in the middle of the train split.
WORKING = """
import multiprocessing, os, signal, sys, time
from sarjax.data.build import build
def progress(stage, done, total):
    if stage == "train" and done == 2:
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        {end}
if __name__ == "__main__":
    build("whu_opt_sar", sys.argv[1], sys.argv[2], jobs=2, progress=progress)
"""

# Says the same while the workers still import this file.
STARTING = """
import multiprocessing, sys, threading, time
from sarjax.data.build import build
def tell():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    time.sleep(1)  # both import by now
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
if __name__ == "__mp_main__":
    time.sleep(10)
if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    build("whu_opt_sar", sys.argv[1], sys.argv[2], jobs=2)
"""


def are_gone(processes, seconds=240):
    """Whether all of `processes` have ended within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(os.path.exists(f"/proc/{pid}") for pid in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def whu_source(tmp_path_factory):
    """Six scenes of four rows of tiles each: enough for workers to be at work while others are written."""
    root = tmp_path_factory.mktemp("scenes")
    fake_data.write_whu(root, names=[f"{i}.tif" for i in range(6)], size=(300, 1100))
    return root


@pytest.mark.parametrize("config", ["scene", "random_tile"])
def test_the_records_are_the_same_to_the_byte(tmp_path, whu_source, config):
    seen = {1: [], 3: []}
    made = {}
    for jobs in seen:
        out = tmp_path / str(jobs)
        report = lambda *at, jobs=jobs: seen[jobs].append(at)  # noqa: E731
        made[jobs] = build("whu_opt_sar", whu_source, out, config, jobs=jobs, progress=report)
        assert os.listdir(out) == ["whu_opt_sar"]
    assert contents(made[1]) == contents(made[3])
    assert seen[1] == seen[3]
    if config == "scene":
        steps = [at[1:] for at in seen[1] if at[0] == "train"]
        assert steps == [(i, 4 * 4) for i in range(4 * 4 + 1)]  # four scenes of four rows


def test_more_processes_than_rows(tmp_path, ombria_source):
    one, many = (build("ombria", ombria_source, tmp_path / str(j), jobs=j) for j in (1, 5))
    assert contents(one) == contents(many)


def test_what_a_worker_refuses(tmp_path, whu_source):
    source = tmp_path / "source"
    shutil.copytree(whu_source, source)
    fake_data.write_tiff(source / "lbl" / "4.tif", np.full((1100, 300), 80, np.uint8))
    with pytest.raises(UserError, match=r"4.tif holds the label 80: labels are 0, 10"):
        build("whu_opt_sar", source, tmp_path / "out", jobs=2)
    assert os.listdir(tmp_path / "out") == []
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed(tmp_path, whu_source):
    def kill(stage, done, total):
        if stage == "train" and done == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"a worker process ended before its work was done, .*fewer --jobs"):
        build("whu_opt_sar", whu_source, tmp_path / "out", jobs=2, progress=kill)
    assert os.listdir(tmp_path / "out") == []
    assert multiprocessing.active_children() == []


def test_an_interrupt_is_not_for_workers(tmp_path, whu_source):
    def interrupt(stage, done, total):
        if stage == "train" and done == 2:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)

    build("whu_opt_sar", whu_source, tmp_path / "out", jobs=2, progress=interrupt)


def test_an_error_of_the_writer_ends_the_workers(tmp_path, whu_source):
    def stop(stage, done, total):
        if stage == "val":
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build("whu_opt_sar", whu_source, tmp_path / "out", jobs=2, progress=stop)
    assert multiprocessing.active_children() == []


def test_no_process(tmp_path, whu_source):
    with pytest.raises(UserError, match="jobs is 0: at least 1"):
        build("whu_opt_sar", whu_source, tmp_path / "out", jobs=0)


def test_killed_in_the_middle_no_worker_lingers_and_it_can_be_run_again(tmp_path, whu_source):
    out = tmp_path / "out"
    script = WORKING.format(end="os.kill(os.getpid(), signal.SIGKILL)")
    result = subprocess.run(
        [sys.executable, "-c", script, whu_source, out], check=False, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in result.stdout.split()]
    assert len(workers) == 2
    assert are_gone(workers)
    assert os.listdir(out) == [".building-whu_opt_sar-scene"]
    with pytest.raises(UserError, match="where there is nothing"):
        open_dataset("whu_opt_sar", data_dir=out)
    again = build("whu_opt_sar", whu_source, out, jobs=2)
    assert os.listdir(out) == ["whu_opt_sar"]
    assert contents(again) == contents(build("whu_opt_sar", whu_source, tmp_path / "other"))


@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("code", [STARTING, WORKING.format(end="time.sleep(3600)")], ids=["starting", "working"])
def test_an_interrupt_ends_all(tmp_path, whu_source, code, everyone):
    """As Ctrl-C does, which goes to the workers too; and one that goes to the build alone."""
    # Longer than all limits below: it is the interrupt that ends it. A loaded machine may take minutes. Tests that
    # a shell runs in its background would hand down that interrupts are ignored.
    attend = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = tmp_path / "script.py"
    script.write_text(attend + code)
    command = [sys.executable, script, whu_source, tmp_path / "out"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode not in (0, None)
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert are_gone(workers)
    assert os.listdir(tmp_path / "out") == []
