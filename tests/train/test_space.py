"""Training with the height of tiles over devices: the same steps, and less memory on each device."""

import dataclasses
import json
import re

import numpy as np
import toy

from sarjax import config
from sarjax.options import Supervised
from sarjax.train import loop


def test_large_tiles_over_devices(tmp_path):
    """Few rows of 256 pixels: there is nothing else to share. Flips and crops take lines from all over a tile."""
    found = []
    for space in (1, 4):
        cfg = toy.config(Supervised(), batch_size=2, steps=2)
        assert cfg.experiment.augment.flip
        execution = dataclasses.replace(cfg.execution, mesh=config.Mesh(1, 1, space), evaluate_every=2)
        said, run = [], tmp_path / str(space)
        loop.train(dataclasses.replace(cfg, execution=execution), run, dataset=toy.dataset(256), say=said.append)
        (memory,) = re.findall(r"and (\d+) MiB per device", " ".join(said))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append((int(memory), [(r["loss"], r["gradient_norm"]) for r in rows if "loss" in r]))
    (memory, losses), (shared, their_losses) = found
    np.testing.assert_allclose(their_losses, losses, rtol=1e-4)
    assert shared < 0.4 * memory, "a view that was gathered for its lines must not stay so"
