"""Every method at toy size, trained for some steps on a mesh: what must not depend on the mesh.

layouts.py FILE METHOD PROCESS PROCESSES PORT: as one of several processes that share eight devices; the first writes
FILE.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from sarjax.models.layers import MaxPool, ReLU
from sarjax.models.resampling import avg_pool
from sarjax.train.feed import LEAST_LINES_IN_STRIPS

STEPS = 10
HEIGHT, WIDTH = LEAST_LINES_IN_STRIPS, 32


class Trained(NamedTuple):
    """losses: of every step. gradient: of the first, its leaves one after the other. answer: (b, h, w) the class that
    the default head gives to each pixel of the first batch after the last step. sure: (b, h, w) by how much the
    likeliest class is likelier than the next.
    """

    losses: np.ndarray
    gradient: np.ndarray
    answer: np.ndarray
    sure: np.ndarray


def _smooth(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
    """SiLU in place of ReLU, and means in place of largest values. A ReLU decides at zero, a pool between two equals,
    and of a million some are within a last bit of it: one that falls the other way on another layout changes the
    gradient by 1e-3 to 1e-2 of its norm, which hides what else might be wrong.
    """
    module = context.module
    if isinstance(module, ReLU) and context.method_name == "__call__":
        return nn.silu(*args)
    if isinstance(module, MaxPool) and context.method_name == "__call__":
        return avg_pool(*args, module.window, module.stride, module.padding)
    return call(*args, **kwargs)


def _narrow(data):
    """Without most columns: high enough for strips, and quick."""
    images = ("label", "sar", "optical", "sar_valid", "optical_valid")

    def cut(x):
        return x[..., :WIDTH, :] if x.ndim == 4 else x[..., :WIDTH]

    tiles = {
        split: [tile | {name: cut(tile[name]) for name in images} for tile in rows]
        for split, rows in data.tiles.items()
    }
    return dataclasses.replace(data, tiles=tiles)


def cases():
    """{method: (Context, data set)} with everything on that it has."""
    import toy
    import toy_dates

    from sarjax.config import Augment, Data, Inputs, Optimizer
    from sarjax.methods import build_method
    from sarjax.methods.record import Context, Schedule, Teacher
    from sarjax.options import (
        DHFA,
        DLLR,
        Change,
        Clustering,
        Distillation,
        LabelReassignment,
        LANet,
        RelationalDistillation,
        SceneClustering,
        Supervised,
    )

    plain, dates = (_narrow(made.dataset(HEIGHT)) for made in (toy, toy_dates))
    # The rate is a constant, the first direction of momentum the gradient.
    sgd = Optimizer(name="sgd", nesterov=False, weight_decay=0.0, warmup=0.0, schedule="constant", learning_rate=1e-3)

    def context(data, options, network, modalities=("sar",), *, teacher=None, labelled=1.0):
        experiment = toy.config(
            options,
            network=network,
            inputs=Inputs(modalities=modalities, by_date=network.DATES > 1),
            augment=Augment(flip=True, rotate=True, jitter=0.3, swap_dates=network.DATES > 1),
            data=Data("toy", labelled=labelled),
            optimizer=sgd,
        ).experiment
        return Context(experiment, data.spec, data.statistics, Schedule(STEPS, 12, 8), teacher)

    def taught(data, options, network, wide, **asked):
        by = context(data, Supervised(), wide, ("optical",))
        teacher = Teacher(build_method(by), by.experiment, data.spec, data.statistics)
        return context(data, options, network, teacher=teacher, **asked)

    lanet, both = LANet(width=1 / 16), ("sar", "optical")
    student, wide = Change(width=1 / 32), Change(width=1 / 16, channels=96)
    # Speckle is drawn by rejection, and what is resampled rounded: a last bit decides which draw or grey value it is.
    clustering = Clustering(warmup=0, speckle=0.0, region=0.0)
    dllr = LabelReassignment(region=True, dice=0.5)
    found = {
        "supervised": (context(plain, Supervised(dice=1.0), lanet), plain),
        "scene_clustering": (context(plain, SceneClustering(clustering=clustering), lanet), plain),
        "dhfa": (
            taught(plain, Distillation(hard=1.0, pairs=1), DHFA(width=1 / 16), DHFA(width=1 / 16), labelled=0.5),
            plain,
        ),
        "dllr": (context(plain, dllr, DLLR(width=1 / 16), both, labelled=0.5), plain),
        "frd": (taught(dates, RelationalDistillation(logits=1.0), student, wide), dates),
    }
    return found


@nn.intercept_methods(_smooth)
def train(context, data, mesh, *, process=0, processes=1) -> Trained:
    """STEPS steps from seed 0; the teacher, where there is one, has fresh weights."""
    from sarjax.data.pipeline import Batches
    from sarjax.evaluate.evaluator import on_host
    from sarjax.methods import build_method
    from sarjax.train.mesh import infer_sharding, place, put_batch, replicated
    from sarjax.train.optimizer import learning_rate, make_optimizer
    from sarjax.train.state import born_sharded, keys
    from sarjax.train.step import make_step

    experiment = context.experiment
    method, optimizer = build_method(context), make_optimizer(experiment.optimizer)
    state = born_sharded(method, optimizer, experiment.seed, False, mesh)
    frozen = None
    if context.teacher is not None:
        shapes = jax.eval_shape(context.teacher.method.init, jax.random.key(7))
        shardings = infer_sharding(mesh, shapes)
        frozen = jax.jit(context.teacher.method.init, out_shardings=shardings)(jax.random.key(7))
    # Whom a tile follows is decided by a table; here the next tile.
    tables = {}
    if isinstance(state.memory, dict) and "neighbours" in state.memory:
        table = np.full(state.memory["neighbours"].shape, -1, np.int32)
        table[:12] = (np.arange(12)[:, None] + 1 + np.arange(table.shape[1])) % 12
        tables["neighbours"] = table
        state.memory["neighbours"] = place(table, state.memory["neighbours"].sharding)
    batches = Batches(
        data.split("train"),
        method.streams,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        labelled=experiment.data.labelled,
        tables=tables,
        process=process,
        processes=processes,
    )
    rate = learning_rate(experiment.optimizer, STEPS)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(method, optimizer, rate, key=keys(experiment.seed)["step"], shardings=places.params)
    jitted = jax.jit(step, out_shardings=(places, replicated(mesh)))
    losses, gradient = [], None
    for s in range(STEPS):
        with jax.set_mesh(mesh):
            state, metrics = jitted(state, frozen, put_batch(mesh, batches[s]))
        losses.append(float(metrics["loss"]))
        if s == 0:
            leaves = jax.device_get(jax.jit(lambda t: t, out_shardings=replicated(mesh))(state.opt_state))
            gradient = np.concatenate([np.ravel(x) for x in jax.tree.leaves(leaves)])
    head = next(iter(method.heads.values()))
    rows = put_batch(mesh, next(iter(batches[0].values())))
    predict = jax.jit(lambda *given: jax.nn.softmax(head.predict(*given)), out_shardings=replicated(mesh))
    likely = np.asarray(on_host(predict(state.params, state.stats, rows)))
    ordered = np.sort(likely, -1)
    return Trained(np.array(losses), gradient, likely.argmax(-1), ordered[..., -1] - ordered[..., -2])


if __name__ == "__main__":
    file, method, process, processes, port = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)

    from sarjax.config import Mesh
    from sarjax.train.mesh import make_mesh

    trained = train(*cases()[method], make_mesh(Mesh()), process=process, processes=processes)
    if process == 0:
        np.savez(file, **trained._asdict())
