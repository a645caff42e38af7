"""The state of a run: everything a resumed run needs that is not a function of (seed, step)."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sarjax.methods.record import Method, Variables
from sarjax.train.mesh import infer_sharding

# Drawing the first parameters takes a moment, LLVM's work on a program of that many leaves several seconds, of which
# this level takes half. The numbers are the same to the bit, which those of level 0 are not.
_QUICKER = {"xla_backend_optimization_level": 1}


@flax.struct.dataclass
class TrainState:
    """step: steps taken, skipped ones included. ema: running mean of the parameters, or None.

    skipped: non-finite steps so far; bad_in_a_row: the last ones without a good one between them.
    """

    step: jax.Array
    params: Any
    stats: Any
    memory: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    bad_in_a_row: jax.Array


def keys(seed: int) -> dict[str, jax.Array]:
    """One root key, split by role once."""
    init, step = jax.random.split(jax.random.key(seed))
    return {"init": init, "step": step}


def create_state(variables: Variables, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=variables.params,
        stats=variables.stats,
        memory=variables.memory,
        opt_state=optimizer.init(variables.params),
        # A copy: a donated buffer may not be given twice.
        ema=jax.tree.map(jnp.copy, variables.params) if ema else None,
        skipped=zero,
        bad_in_a_row=jnp.zeros((), jnp.int32),
    )


def abstract_state(method: Method, optimizer: optax.GradientTransformation, seed: int, ema: bool, mesh: Any) -> Any:
    """Shapes and shardings of the state, without computing it."""
    shapes = jax.eval_shape(lambda: create_state(method.init(keys(seed)["init"]), optimizer, ema))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        infer_sharding(mesh, shapes),
    )


def born_sharded(method: Method, optimizer: optax.GradientTransformation, seed: int, ema: bool, mesh: Any) -> Any:
    """The state at step 0, every leaf born where it will live: never whole on one device first."""
    return born(method, optimizer, seed, abstract_state(method, optimizer, seed, ema, mesh))


def born(method: Method, optimizer: optax.GradientTransformation, seed: int, abstract: Any) -> Any:
    """`born_sharded` as the state that `abstract_state` has traced."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    first = jax.jit(
        lambda key: create_state(method.init(key), optimizer, abstract.ema is not None),
        out_shardings=shardings,
        compiler_options=_QUICKER if shardings.step.mesh.devices.flat[0].platform == "cpu" else None,
    )
    return first(keys(seed)["init"])
