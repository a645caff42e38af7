"""Test-time augmentation: the mean over the eight symmetries of the square."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Batch = Mapping[str, Array]


def over_symmetries(apply: Callable[[Batch], Float[Array, "b h w k"]]) -> Callable[[Batch], Float[Array, "b h w k"]]:
    """`apply` averaged over flips and transpositions of its images, each undone in what it returns.

    Images (b, t, h, w, c) and masks (b, t, h, w) are moved; what has fewer axes is left alone. The four flips run one
    after the other, so that it takes no more memory than `apply` does; sides need not be equal.
    """

    def averaged(batch: Batch) -> Float[Array, "b h w k"]:
        total: Array | float = 0.0
        for transposed in (False, True):
            turned = _each(batch, lambda x, t=transposed: jnp.swapaxes(x, 2, 3) if t else x)

            def add(k: Array, sums: Array, turned: Batch = turned) -> Array:
                moved = _each(turned, lambda x: _flip(_flip(x, 2, k & 1), 3, k >> 1))
                return sums + _flip(_flip(apply(moved), 1, k & 1), 2, k >> 1)

            shape = jax.eval_shape(apply, turned)
            sums = jax.lax.fori_loop(0, 4, add, jnp.zeros(shape.shape, shape.dtype))
            total += jnp.swapaxes(sums, 1, 2) if transposed else sums
        return total / 8

    return averaged


def _each(batch: Batch, move: Callable[[Array], Array]) -> dict[str, Array]:
    return {name: move(x) if x.ndim >= 4 else x for name, x in batch.items()}


def _flip(x: Array, axis: int, really: Array) -> Array:
    return jnp.where(really > 0, jnp.flip(x, axis), x)
