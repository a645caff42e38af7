"""The training step as a compiled program, from shapes alone: nothing is read, nothing is computed.

What it holds on each device, and what it sends between them. `sarjax plan` extrapolates from it; tests and benchmarks
count in it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from sarjax.config import Experiment
from sarjax.methods import build_method
from sarjax.methods.record import Context, Method, Schedule, Teacher, Tree, Variables
from sarjax.models.convolution import as_elsewhere
from sarjax.train.collectives import MOVES, Collective, collectives
from sarjax.train.feed import training_modalities
from sarjax.train.mesh import AXES, batch_sharding, infer_sharding
from sarjax.train.optimizer import learning_rate, make_optimizer
from sarjax.train.run import make_schedule
from sarjax.train.state import abstract_state
from sarjax.train.step import jit_step

# LLVM's work changes neither buffers nor collectives, and takes most of the time.
QUICK = {"xla_backend_optimization_level": 0}


class Program(NamedTuple):
    """A compiled step. state, frozen, batch: shapes and shardings of what it is given. sizes: {axis: devices}."""

    compiled: Any
    state: Any
    frozen: Tree
    batch: Tree
    sizes: Mapping[str, int]

    @property
    def temporaries(self) -> int:
        """Bytes on a device that live during the step only."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def peak(self) -> int:
        """Bytes on a device: arguments, outputs and temporaries; what shares a buffer counts once."""
        m = self.compiled.memory_analysis()
        return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes

    def collectives(self) -> list[Collective]:
        return collectives(self.compiled.as_text())

    def purpose(self, one: Collective) -> str:
        """Why it is sent: "parameters" gathered, "gradients" summed, "rows" of the batch moved, other "sums"."""
        leaves = jax.tree.leaves((self.state.params, self.frozen))
        whole, parts = ({shape(x) for x in leaves if not small(x)} for shape in (np.shape, part))
        if one.kind in MOVES:
            gathered = {np.shape(x) for x in jax.tree.leaves((self.state, self.frozen)) if np.shape(x) != part(x)}
            return "parameters" if one.kind == "all-gather" and one.shape in gathered else "rows"
        return "gradients" if one.shape in whole | parts else "sums"


def small(leaf: Any) -> bool:
    """A vector or a number: its shape does not tell it from a sum over rows."""
    return sum(n > 1 for n in np.shape(leaf)) < 2


def part(leaf: Any) -> tuple[int, ...]:
    """The shape of what one device holds of a leaf."""
    return leaf.sharding.shard_shape(leaf.shape)


def device_bytes(tree: Tree) -> int:
    """Bytes that one device holds of a tree of shapes and shardings."""
    return sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there: enough for sharding rules, not for a compiler."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def planned_method(experiment: Experiment, data: Any, teacher: Teacher | None) -> tuple[Method, Schedule]:
    """The method, as a run on `data` would build it, and its schedule."""
    context = Context(experiment, data.spec, data.statistics, Schedule(1, 1, 1), teacher)
    first = next(iter(build_method(context).streams.values()))
    schedule = make_schedule(experiment, first, data.statistics.tiles["train"])
    return build_method(context._replace(schedule=schedule)), schedule


def planned_state(method: Method, experiment: Experiment, teacher: Teacher | None, mesh: Any) -> tuple[Any, Tree]:
    """Shapes and shardings of the state and of a teacher's variables on a mesh, which may be abstract."""
    state = abstract_state(
        method, make_optimizer(experiment.optimizer), experiment.seed, experiment.optimizer.ema > 0, mesh
    )
    if teacher is None:
        return state, None
    born = jax.eval_shape(teacher.method.init, jax.random.key(0))
    variables = Variables(born.params, born.stats, {})
    return state, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        variables,
        infer_sharding(mesh, variables),
    )


def planned_batch(method: Method, experiment: Experiment, data: Any, mesh: Any) -> Tree:
    """Shapes and shardings of a global batch, as `sarjax.data.pipeline.Batches` makes it."""
    height, width = data.tile
    bands = {name: data.spec.modality(name) for name in training_modalities(method, data, experiment)}

    def rows(kind: str, n: int) -> dict[str, Any]:
        images = {name: ((n, data.spec.dates, height, width, len(m.bands)), m.dtype) for name, m in bands.items()}
        valid = {f"{name}_valid": ((n, data.spec.dates, height, width), "uint8") for name in bands}
        label = dict.fromkeys(("label", "hidden_label")[: 1 + (kind == "unlabelled")], ((n, height, width), "uint8"))
        numbers = dict.fromkeys(("id", "row", "position"), ((n,), "int32")) | {"row_valid": ((n,), "uint8")}
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))
            for name, (shape, dtype) in (images | valid | label | numbers).items()
        }

    return {
        name: rows(stream.kind, round(stream.rows * experiment.batch_size)) for name, stream in method.streams.items()
    }


def compile_step(experiment: Experiment, data: Any, mesh: jax.sharding.Mesh, teacher: Teacher | None = None) -> Program:
    """Compiles the step of a run for a mesh of the devices at hand. data: a data set, or `Described`.

    Host devices stand for accelerators here: what networks do otherwise on a CPU (`sarjax.models.convolution`) is left
    out.
    """
    method, schedule = planned_method(experiment, data, teacher)
    state, frozen = planned_state(method, experiment, teacher, mesh)
    batch = planned_batch(method, experiment, data, mesh)
    rate = learning_rate(experiment.optimizer, schedule.steps)
    with jax.set_mesh(mesh), as_elsewhere():  # a mesh as in a run
        lowered = jit_step(method, experiment, rate, state).lower(state, frozen, batch)
    options = QUICK if mesh.devices.flat[0].platform == "cpu" else None
    return Program(lowered.compile(compiler_options=options), state, frozen, batch, dict(mesh.shape))
