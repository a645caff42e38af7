"""FRD on the toy data set of two dates, as its tests call it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import toy

from sarjax.config import Augment, Inputs
from sarjax.data.pipeline import Batches
from sarjax.methods import build_method
from sarjax.methods.record import Context, Rest, Schedule, Teacher
from sarjax.options import Change, NetworkOptions, RelationalDistillation, Supervised
from sarjax.spec import ClassSpec

SMALL, WIDE = Change(width=1 / 32), Change(width=1 / 16, channels=96)
NOTHING = dict.fromkeys(("bfdd_pixel", "bfdd_category", "ccrd_pixel", "ccrd_cluster"), 0.0)
KEY = jax.random.key(1)
NAMES = ("bfdd_pixel", "bfdd_category", "ccrd_pixel", "ccrd_cluster")


def two_dates() -> toy.MemoryDataset:
    """The toy's tiles after something changed: before, the second class is not there. Optical misses a stripe."""
    made = toy.dataset(size=64)
    classes = (ClassSpec("unchanged", (9, 9, 9)), ClassSpec("changed", (255, 0, 0)))
    spec = dataclasses.replace(made.spec, classes=classes, excluded=(), dates=2)
    rng, tiles = np.random.default_rng(3), {}
    for split, rows in made.tiles.items():
        tiles[split] = []
        for i, tile in enumerate(rows):
            after, label = {}, tile["label"]
            for m in ("sar", "optical"):
                before = np.clip(np.median(tile[m]) + rng.normal(0, 9, tile[m].shape), 1, 255).astype(np.uint8)
                valid = np.concatenate([tile[f"{m}_valid"]] * 2)
                if m == "optical" and i % 3 == 0:
                    valid[0, :, :7] = 0
                after |= {m: np.concatenate([before, tile[m]]), f"{m}_valid": valid}
            tiles[split].append({"id": tile["id"], "label": label, **after})
    return dataclasses.replace(made, spec=spec, tiles=tiles)


DATA = two_dates()


def context_of(
    options, network: NetworkOptions = SMALL, *, modalities=("sar",), teacher=None, spec=DATA.spec, **inputs
):
    experiment = toy.config(
        options,
        network=network,
        inputs=Inputs(modalities=modalities, **{"by_date": True} | inputs),
        augment=Augment(flip=True, rotate=True, swap_dates=True, speckle=3.0),
    ).experiment
    return Context(experiment, spec, DATA.statistics, Schedule(6, 12, 4), teacher)


def drawn(method, seed=0):
    """What `method.init` could have made: compiling it takes seconds."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(method.init, jax.random.key(0)))


def taught_by(network: NetworkOptions = WIDE, modalities=("sar", "optical"), **inputs):
    """A teacher with fresh weights, and its variables."""
    context = context_of(Supervised(), network, modalities=modalities, **inputs)
    method = build_method(context)
    variables = drawn(method, 7)
    return Teacher(method, context.experiment, DATA.spec, DATA.statistics), variables


def build(network: NetworkOptions = SMALL, taught=None, **options):
    teacher, frozen = taught or taught_by()
    method = build_method(context_of(RelationalDistillation(**options), network, teacher=teacher))
    variables = drawn(method)
    return method, variables, frozen, Batches(DATA.split("train"), method.streams, batch_size=4, seed=0)[0]


def run(method, variables, frozen, batch, key=KEY):
    rest = Rest(frozen, variables.stats, variables.memory)
    return jax.jit(method.loss)(variables.params, rest, batch, key, jnp.zeros((), jnp.int32))
