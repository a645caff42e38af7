"""The same rows come out, however the batch is laid over devices and cut into microbatches."""

import jax
import numpy as np
import pytest
from augment.fake_batch import make_batch, make_spec
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.augment.geometry import geometry
from sarjax.augment.inputs import network_inputs
from sarjax.augment.radiometry import radiometry
from sarjax.config import Augment, Inputs

SPEC = make_spec()
INPUTS = Inputs(("sar", "optical"), normalisation="tile", local_mean=3, date_difference=True)
AUGMENT = Augment(crop=8, speckle=3.0, jitter=0.2, swap_dates=True)


def pipeline(batch):
    key = jax.random.key(5)
    moved = geometry(batch, key, AUGMENT)
    return moved, network_inputs(radiometry(moved, key, AUGMENT, SPEC), INPUTS, SPEC, None)


def compare(got, wanted):
    assert all(np.array_equal(got[0][k], wanted[0][k]) for k in wanted[0])
    np.testing.assert_allclose(got[1], wanted[1], atol=2e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_sharded_batches_give_the_same(shape, batch):
    mesh = jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto,) * 2)

    def put(x):
        axes = {1: ("data",), 3: ("data", "space"), 4: ("data", None, "space"), 5: ("data", None, "space")}[x.ndim]
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    compare(jax.jit(pipeline)({k: put(v) for k, v in batch.items()}), jax.jit(pipeline)(batch))


def test_microbatches_give_the_same():
    batch = make_batch()
    whole = jax.jit(pipeline)(batch)
    for rows in (slice(0, 4), slice(4, 8)):
        part = jax.jit(pipeline)({k: v[rows] for k, v in batch.items()})
        compare(part, ({k: v[rows] for k, v in whole[0].items()}, whole[1][rows]))
