"""One training step: a pure function of (state, frozen, batch), jitted and donated by the loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sarjax.config import Experiment
from sarjax.methods.record import Method, Outputs, Rest, Term, Tree
from sarjax.train.mesh import gathered, replicated
from sarjax.train.optimizer import make_optimizer
from sarjax.train.state import TrainState, keys

Metrics = dict[str, jax.Array]


def objective(terms: dict[str, Term], weights: dict[str, jax.Array]) -> jax.Array:
    """sum factor * total / weight, with the weights of the whole batch. No gradient flows through a weight."""
    whole = {k: t._replace(weight=jax.lax.stop_gradient(weights[k])) for k, t in terms.items()}
    return sum((t.factor * t.mean() for t in whole.values()), start=jnp.zeros(()))


def microbatches(batch: Tree, count: int) -> Tree:
    """(rows, ...) -> (count, rows / count, ...): microbatch i is rows i, count + i, ... of every stream.

    Strided, because a shard holds consecutive rows: so every microbatch lies on all devices and nothing moves.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch)


def _first(x: jax.Array) -> jax.Array:
    return x[0]


def _as_arrays(terms: dict[str, Term]) -> dict[str, Term]:
    return {name: Term(*(jnp.asarray(x, jnp.float32) for x in t)) for name, t in terms.items()}


def _merge(a: dict[str, Term], b: dict[str, Term]) -> dict[str, Term]:
    return {k: Term(a[k].total + b[k].total, a[k].weight + b[k].weight, b[k].factor) for k in a}


def jit_step(method: Method, experiment: Experiment, schedule: optax.Schedule, state: TrainState) -> Any:
    """The step as a run takes it, jitted and donated; state: shapes and shardings, as `abstract_state` says them."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(
        method,
        make_optimizer(experiment.optimizer),
        schedule,
        key=keys(experiment.seed)["step"],
        accumulate=experiment.accumulate,
        ema=experiment.optimizer.ema,
        shardings=shardings.params,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(shardings.step.mesh)))


def make_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    key: jax.Array,
    accumulate: int = 1,
    ema: float = 0.0,
    shardings: Tree = None,
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics).

    With `accumulate` > 1 the gradients of that many microbatches are added before the one update; statistics and
    memory pass from one to the next. shardings: where the parameters live; each is gathered once a step (None: that is
    left to the compiler). A step whose loss, gradient or result is not finite leaves all but the counters as they were.
    """

    def loss(params: Tree, rest: Rest, batch: Tree, k: jax.Array, step: jax.Array, weights: dict | None):
        terms, outputs = method.loss(params, rest, batch, k, step)
        terms, metrics = _as_arrays(terms), _as_arrays(outputs.metrics)
        own = {name: t.weight for name, t in terms.items()}
        return objective(terms, own if weights is None else weights), (terms, outputs._replace(metrics=metrics))

    def gradient(*args):
        grads, found = jax.grad(loss, has_aux=True)(*args)
        # Over fsdp summed and cut, which is one reduce-scatter where the compiler has it; over data the parts alone.
        return (grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)), found

    def whole(params: Tree, rest: Rest, batch: Tree, k: jax.Array, step: jax.Array):
        grads, (terms, outputs) = gradient(params, rest, batch, k, step, None)
        return grads, terms, outputs

    def in_parts(params: Tree, rest: Rest, batch: Tree, k: jax.Array, step: jax.Array):
        parts = microbatches(batch, accumulate)
        shapes = jax.eval_shape(lambda part: gradient(params, rest, part, k, step, None), jax.tree.map(_first, parts))
        grads, (terms, outputs) = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        # The weights of the whole batch come first. Only they are read from this pass, so where they depend on the
        # labels alone the compiler drops the networks from it.
        def weigh(carry, part):
            stats, memory, weights = carry
            new, outputs = method.loss(params, Rest(rest.frozen, stats, memory), part, k, step)
            return (outputs.stats, outputs.memory, {name: weights[name] + t.weight for name, t in new.items()}), None

        start = (rest.stats, rest.memory, {name: t.weight for name, t in terms.items()})
        (_, _, weights), _ = jax.lax.scan(weigh, start, parts)

        def add(carry, part):
            stats, memory, grads, terms, metrics = carry
            g, (new, outputs) = gradient(params, Rest(rest.frozen, stats, memory), part, k, step, weights)
            grads = jax.tree.map(jnp.add, grads, g)
            return (outputs.stats, outputs.memory, grads, _merge(terms, new), _merge(metrics, outputs.metrics)), None

        start = (rest.stats, rest.memory, grads, terms, outputs.metrics)
        (stats, memory, grads, terms, metrics), _ = jax.lax.scan(add, start, parts)
        return grads, terms, Outputs(stats, memory, metrics)

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, Metrics]:
        params = state.params
        if shardings is not None:
            mesh = jax.tree.leaves(shardings)[0].mesh
            params, frozen = gathered(params, mesh), gathered(frozen, mesh)
        rest = Rest(frozen, state.stats, state.memory)
        compute = whole if accumulate == 1 else in_parts
        grads, terms, outputs = compute(params, rest, batch, jax.random.fold_in(key, state.step), state.step)
        value = objective(terms, {name: t.weight for name, t in terms.items()})
        norm = optax.tree.norm(grads)
        rate = jnp.asarray(schedule(state.step), jnp.float32)

        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - rate.astype(p.dtype) * d, state.params, direction)
        mean = optax.incremental_update(params, state.ema, 1 - ema) if state.ema is not None else None

        # A finite gradient can still overflow the parameters.
        good = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
        bad = (~good).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            stats=keep(outputs.stats, state.stats),
            memory=keep(outputs.memory, state.memory),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(mean, state.ema),
            skipped=state.skipped + bad,
            bad_in_a_row=(state.bad_in_a_row + bad) * bad,
        )
        metrics = {name: t.mean() for name, t in (terms | outputs.metrics).items()}
        metrics |= {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": rate,
            "skipped": new.skipped,
            "bad_in_a_row": new.bad_in_a_row,
        }
        return new, metrics

    return step
