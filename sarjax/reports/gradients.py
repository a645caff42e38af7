"""What the terms of an objective do to the parameters that they share: how strongly each pulls, and which way.

An auxiliary whose gradient is larger than the main one's and orthogonal to it takes steps away from the main task and
gives nothing back; one that points the same way helps; one that points the other way is in conflict.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.files import write_atomically
from sarjax.methods.record import Batch, Method, Rest, Tree
from sarjax.reports.run import results_folder
from sarjax.reports.training import open_training
from sarjax.train.feed import host_tables, make_batches
from sarjax.train.mesh import put_batch
from sarjax.train.state import keys


class Pull(NamedTuple):
    """What a term does on the median batch. name, factor: of the term. value: without the factor.

    norm: of its gradient, factor included, over the shared parameters. cosine: with the gradient of the first term;
    None where either is zero.
    """

    name: str
    factor: float
    value: float
    norm: float
    cosine: float | None


def term_names(method: Method, params: Tree, rest: Rest, batch: Batch, key: Array) -> list[str]:
    """The terms in the method's order, the main one first: a dictionary that has been traced comes back sorted."""
    names: list[str] = []

    def note(*args: Any) -> None:
        names.extend(method.loss(*args)[0])

    jax.eval_shape(note, params, rest, batch, key, jnp.int32(0))
    return names


def products(
    method: Method, params: Tree, rest: Rest, batch: Batch, key: Array, step: Array
) -> tuple[dict[str, Float[Array, " n"]], Float[Array, "leaves n n"]]:
    """({"value", "factor"} of the n terms in their order, scalar products of their gradients per leaf of `params`)."""

    def terms(p: Tree):
        found = list(method.loss(p, rest, batch, key, step)[0].values())
        weights = [jax.lax.stop_gradient(t.weight) for t in found]
        means = [t._replace(weight=w).mean() for t, w in zip(found, weights, strict=True)]
        factors = [jnp.asarray(t.factor, jnp.float32) for t in found]
        return jnp.stack(factors) * jnp.stack(means), {"value": jnp.stack(means), "factor": jnp.stack(factors)}

    weighted, back, facts = jax.vjp(terms, params, has_aux=True)
    pulls = [jax.tree.leaves(back(one)[0]) for one in jnp.eye(len(weighted))]
    found = []
    for leaf in zip(*pulls, strict=True):
        rows = jnp.stack([g.astype(jnp.float32).ravel() for g in leaf])
        found.append(jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST))
    return facts, jnp.stack(found)


def summarise(
    names: list[str], facts: list[dict[str, np.ndarray]], found: Float[np.ndarray, "batches leaves n n"]
) -> tuple[list[Pull], np.ndarray]:
    """The terms' pulls, and which leaves more than one of them moves (those that they are taken over)."""
    moved = (np.diagonal(found, axis1=2, axis2=3) > 0).any(0)
    shared = moved.sum(1) > 1
    total = found[:, shared].sum(1)
    norms = np.sqrt(np.diagonal(total, axis1=1, axis2=2))
    pulls = []
    for i, name in enumerate(names):
        length = norms[:, i] * norms[:, 0]
        cosine = float(np.median(total[:, i, 0][length > 0] / length[length > 0])) if (length > 0).any() else None
        factor, value = (float(np.median([f[key][i] for f in facts])) for key in ("factor", "value"))
        pulls.append(Pull(name, factor, value, float(np.median(norms[:, i])), cosine))
    return pulls, shared


def report_gradients(
    run: Path,
    *,
    batches: int = 8,
    checkpoint: str = "last",
    data_dir: str = "",
    say: Callable[[str], None] = print,
) -> tuple[list[Pull], Path]:
    """Writes RUN/reports/gradients-<checkpoint>.json, of the training batches after a checkpoint; returns the pulls.

    They are those that the next steps would take, also beyond the run's last, with the partners of the checkpoint.
    UserError for data other than the run's own.
    """
    if batches < 1:
        raise UserError(f"--batches is {batches}, but should be a whole number from 1.")
    training = open_training(run, checkpoint, data_dir, say)
    config, dataset, mesh, method, state, rest, where = training
    experiment, step = config.experiment, int(state.step)
    stream = make_batches(method, dataset, config, mesh)
    stream.tables = host_tables(method, state.memory)
    key = keys(experiment.seed)["step"]

    @jax.jit
    def compute(params: Tree, rest: Rest, batch: Batch, at: Array):
        return products(method, params, rest, batch, jax.random.fold_in(key, at), at)

    facts, found = [], []
    for at in range(step, step + batches):
        batch = put_batch(mesh, stream[at])
        one, two = jax.device_get(compute(state.params, rest, batch, jnp.int32(at)))
        facts.append(one)
        found.append(two)
    names = term_names(method, state.params, rest, batch, key)
    pulls, shared = summarise(names, facts, np.stack(found))
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(state.params)])
    path = results_folder(run, "reports") / f"gradients-{checkpoint}.json"
    content = {
        "run": str(run),
        "checkpoint": where,
        "batches": len(facts),
        "shared_parameters": int(sizes[shared].sum()),
        "terms": [pull._asdict() for pull in pulls],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return pulls, path
