#!/usr/bin/env python3
"""Starts a command in N processes on this machine that find each other through jax.distributed.

    python launch/local.py -n 4 -- sarjax train cheng_lanet --workdir RUN

Each process gets an equal share of the GPUs, or where there is none the CPU, and writes a log of its own; that of the
first is also shown. One that fails ends all, and its last lines are shown. SIGTERM and Ctrl-C are passed on as SIGTERM,
at which a training saves a checkpoint; a second one kills. The exit code is that of the first process that failed.
Needs the standard library alone.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAST_LINES = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    parser.add_argument("--logs", type=Path, help="folder of the logs (default: a new one under the temporary files)")
    parser.add_argument("--grace", type=float, default=15.0, help="seconds between SIGTERM and SIGKILL after a failure")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    asked = parser.parse_args()
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if asked.processes < 1 or not command:
        parser.error("at least 1 process, and a command after -- are needed")
    if shutil.which(command[0]) is None:
        parser.error(f"{command[0]} is no program that could be started")
    gpus = [] if asked.cpu else visible_gpus()
    if len(gpus) % asked.processes:
        parser.error(
            f"{asked.processes} processes cannot share {len(gpus)} GPUs equally; a divisor, or --cpu, would do"
        )
    logs = asked.logs or Path(tempfile.mkdtemp(prefix="local-"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"logs of {asked.processes} processes: {logs}", file=sys.stderr, flush=True)
    processes = start(command, asked.processes, gpus, asked.cpu, logs)
    return watch(processes, logs, asked.grace)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def log_of(logs: Path, process: int) -> Path:
    return logs / f"process-{process}.log"


def start(command: list[str], count: int, gpus: list[str], cpu: bool, logs: Path) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    processes = []
    for i in range(count):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
            "PYTHONUNBUFFERED": "1",
        }
        if gpus:
            share = len(gpus) // count
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * share : (i + 1) * share])
        elif cpu:
            env["JAX_PLATFORMS"] = "cpu"
        with log_of(logs, i).open("wb") as log:
            # In a group of its own: Ctrl-C reaches the launcher alone, which passes it on.
            processes.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )
    return processes


def watch(processes: list[subprocess.Popen], logs: Path, grace: float) -> int:
    """Waits until all have ended; returns the exit code of the first that failed, 128 + N for signal N, or 0."""
    signals = 0

    def pass_on(*_: object) -> None:
        nonlocal signals
        signals += 1
        tell(processes, signal.SIGTERM if signals == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    failed, deadline = None, float("inf")
    with log_of(logs, 0).open("rb") as first:
        while True:
            running = [process for process in processes if process.poll() is None]
            sys.stdout.buffer.write(first.read())
            sys.stdout.flush()
            bad = [i for i, process in enumerate(processes) if process.returncode]
            if bad and failed is None:
                failed, deadline = bad[0], time.monotonic() + grace
                tell(processes, signal.SIGTERM)
            if time.monotonic() > deadline:
                tell(processes, signal.SIGKILL)
            if not running:
                break
            time.sleep(0.05)
    if failed is None:
        return 0
    code = processes[failed].returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    log = log_of(logs, failed)
    print(f"process {failed} of {len(processes)} ended {how}; the last lines of {log}:", file=sys.stderr)
    for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]:
        print(f"  {line}", file=sys.stderr)
    return 128 - code if code < 0 else code


def tell(processes: list[subprocess.Popen], number: int) -> None:
    """Sends a signal to those that run, each with what it has started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
