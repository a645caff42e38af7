"""Training with the height of crops over devices: the same step, and less memory on each."""

import jax
import numpy as np
import toy
from train.test_step import setup

from sarjax import config
from sarjax.options import FCN
from sarjax.train.mesh import make_mesh, put_batch


def test_large_crops_over_devices(monkeypatch):
    """Crops of 256 pixels, few rows of them: there is nothing else to share."""
    data = toy.dataset(256)
    monkeypatch.setattr("train.test_step.DATA", data)
    cfg = toy.config(network=FCN(width=1 / 16, stages=2), augment=config.Augment(), batch_size=2)
    found, memory = [], []
    for space in (1, 4):
        mesh = make_mesh(config.Mesh(1, 1, space), jax.devices()[:space])
        state, step, batches = setup(cfg, mesh)
        args = state, None, put_batch(mesh, batches[0])
        compiled = step.lower(*args).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(jax.device_get(compiled(*args)))
    (one, one_metrics), (many, many_metrics) = found
    np.testing.assert_allclose(many_metrics["loss"], one_metrics["loss"], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (one.params, many.params)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * max(np.abs(a).max(), 1e-2))
    assert memory[1] < 0.5 * memory[0], memory
