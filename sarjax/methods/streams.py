"""Rows of two streams in one batch: each row of the first followed by its share of the second's.

So every device holds both kinds, and nothing moves between devices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sarjax.augment.geometry import geometry
from sarjax.augment.radiometry import radiometry
from sarjax.config import Augment
from sarjax.methods.record import Batch
from sarjax.spec import DatasetSpec


def augmented(
    rows: Batch, key: jax.Array, options: Augment, spec: DatasetSpec, role: int | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Rows of a stream after geometry, and after radiometry too.

    role: None for the first stream of a method, whose draws are then those of `supervised`; another number for each
    other stream.
    """
    where, how = (k if role is None else jax.random.fold_in(k, role) for k in jax.random.split(key))
    cut = geometry(rows, where, options)
    return cut, radiometry(cut, how, options, spec)


def interleaved(first: Array, second: Array) -> Array:
    """Row i of `first` (n, ...), then rows i m to (i + 1) m of `second` (n m, ...): (n + n m, ...)."""
    n = len(first)
    joined = jnp.concatenate([x.reshape(n, -1, *x.shape[1:]) for x in (first, second)], 1)
    return joined.reshape(-1, *joined.shape[2:])


def separated(x: Array, n: int) -> tuple[Array, Array]:
    """What `interleaved` joined, the first part having n rows."""
    runs = x.reshape(n, -1, *x.shape[1:])
    return runs[:, 0], runs[:, 1:].reshape(-1, *x.shape[1:])


def interleaved_rows(first: Batch, second: Batch) -> dict[str, Array]:
    """`interleaved`, for every key that both hold."""
    return {name: interleaved(first[name], second[name]) for name in sorted(set(first) & set(second))}


def merged(parts: list[Mapping[str, Array]]) -> dict[str, Array]:
    """One or two parts as one batch."""
    return dict(parts[0]) if len(parts) == 1 else interleaved_rows(*parts)
