"""Trains the toy method in a process of its own, so that it can be killed, or be one of several.

run_toy.py WORKDIR STEPS PAUSE DEVICES [PROCESS PROCESSES PORT]
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import jax

workdir, steps, pause, devices = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
if len(sys.argv) > 5:
    process, processes, port = map(int, sys.argv[5:])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=20)

import toy  # noqa: E402

import sarjax  # noqa: E402
from sarjax.options import Clustering, SceneClustering  # noqa: E402
from sarjax.train import loop  # noqa: E402


class Slow(loop.Terminal):
    """A pause after each step, so that the test can choose where to strike."""

    def advance(self, step):
        super().advance(step)
        time.sleep(pause)


class Dying(loop.Checkpoints):
    """Killed when a checkpoint of a certain step has begun to be written."""

    def save(self, step, *args):
        super().save(step, *args)
        if step == int(os.environ.get("DIE_SAVING", "0")) and self.directory.name == "checkpoints":
            os.kill(os.getpid(), signal.SIGKILL)


loop.Terminal, loop.Checkpoints = Slow, Dying
methods = {"toy": toy.Toy(), "scene_clustering": SceneClustering(clustering=Clustering(warmup=1))}
method = methods[os.environ.get("METHOD", "toy")]
config = toy.config(method, steps=steps)
execution = dataclasses.replace(config.execution, prefetch=int(os.environ.get("PREFETCH", "1")))
print(f"sarjax is {sarjax.__file__}", file=sys.stderr)
loop.train(
    dataclasses.replace(config, execution=execution),
    workdir,
    dataset=toy.dataset(),
    say=lambda text: print(text, file=sys.stderr),
)
