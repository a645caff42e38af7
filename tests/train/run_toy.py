"""Trains the toy method in a process of its own, so that it can be killed: run_toy.py WORKDIR [steps] [pause]."""

import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import toy  # noqa: E402

from sarjax.train import loop  # noqa: E402

workdir, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
data = toy.dataset()


class Slow(loop.Terminal):
    """A pause after each step, so that the test can choose where to strike."""

    def advance(self, step):
        super().advance(step)
        time.sleep(pause)


loop.Terminal = Slow
loop.train(toy.config(toy.Toy(), steps=steps), workdir, dataset=data, say=lambda text: print(text, file=sys.stderr))
