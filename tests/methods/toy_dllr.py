"""DLLR on the toy data set, as its tests call it."""

import jax
import jax.numpy as jnp
import numpy as np
import toy

from sarjax.config import Augment, Data, Inputs
from sarjax.data.pipeline import Batches
from sarjax.methods import build_method
from sarjax.methods.dllr import SENSORS
from sarjax.methods.record import Context, Rest, Schedule
from sarjax.options import DLLR, LabelReassignment

DATA = toy.dataset(size=64)
SMALL = DLLR(width=0.0625)
BOTH = Inputs(modalities=("sar", "optical"))
KEY = jax.random.key(1)
STILL = Augment(flip=False, rotate=False)
OFF = {"cell": 0, "dropout": 0.0, "complementary": 0.0, "cross": 0.0, "consistency": 0.0}
PLAIN = {"prediction": False, "prototype": False}


def context_of(options, *, network=SMALL, inputs=BOTH, labelled=0.5, augment=None):
    experiment = toy.config(
        options, network=network, inputs=inputs, augment=augment or STILL, data=Data("toy", labelled=labelled)
    ).experiment
    return Context(experiment, DATA.spec, DATA.statistics, Schedule(20, 12, 4))


def build(labelled=0.5, augment=None, **options):
    method = build_method(context_of(LabelReassignment(**options), labelled=labelled, augment=augment))
    variables = jax.jit(method.init)(jax.random.key(0))
    batch = Batches(DATA.split("train"), method.streams, batch_size=4, seed=0, labelled=labelled)[0]
    return method, variables, batch


def run(method, variables, batch, step=3):
    rest = Rest(None, variables.stats, variables.memory)
    return jax.jit(method.loss)(variables.params, rest, batch, KEY, jnp.asarray(step, jnp.int32))


def gradient(method, variables, batch, step=3):
    def value(params):
        terms, _ = method.loss(params, Rest(None, variables.stats, variables.memory), batch, KEY, jnp.int32(step))
        return sum(t.factor * t.mean() for t in terms.values())

    return jax.jit(jax.grad(value))(variables.params)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def seen_by(batch):
    """Where each head has data, of a batch that is not augmented."""
    where = {m: (batch[f"{m}_valid"] > 0).all(1) for m in SENSORS}
    return where | {"fused": where["sar"] | where["optical"]}


def outputs_of(method, variables, batch):
    """Logits of every head in inference, at the size of the image."""
    return {
        name: jax.jit(head.predict)(variables.params, variables.stats, batch) for name, head in method.heads.items()
    }
