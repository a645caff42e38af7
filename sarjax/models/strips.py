"""One tall image in strips over devices: rows below the image that are there only so that all strips are equal.

Inside `strips(image, padded)` networks compute on images of `padded` rows of which the first `image` are the image, and
give for these what they give for the image alone: whatever looks around a cell sees zeros (of a max-pool, -inf) below
the image. Convolutions are seen to here; pools and resizing, in `sarjax.models.resampling`, ask `rows_of`. No network
knows of it. Both heights are multiples of all strides and patches of the network (`FieldOfView.alignment`).

There the compiler has only neighbouring rows to exchange between devices: nothing gathers an image. It is used while a
program is traced; outside of `strips` nothing changes.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Rows(NamedTuple):
    """Rows of the image, and rows with the padding below it; in pixels, or in cells of a map."""

    image: int
    padded: int


# Of jax, so that a function which is jitted inside is traced again for other rows.
_ROWS = jax.make_user_context(None)


@contextlib.contextmanager
def strips(image: int, padded: int) -> Iterator[None]:
    """Images that networks see inside have `padded` rows, the last `padded` - `image` of them padding."""
    if not 0 < image <= padded:
        raise ValueError(f"an image of {image} rows cannot be padded to {padded}")
    with _ROWS(Rows(image, padded)), nn.intercept_methods(_convolve):
        yield


def in_strips() -> bool:
    return _ROWS.value is not None


def rows_of(height: int) -> int:
    """How many rows of a map of `height` rows are the image's; outside of `strips` all."""
    rows = _ROWS.value
    if rows is None:
        return height
    image, rest = divmod(height * rows.image, rows.padded)
    if rest:
        raise ValueError(f"a map of {height} rows is none of an image of {rows.image} rows padded to {rows.padded}")
    return image


def blanked(x: Float[Array, "b h w c"], value: float = 0.0) -> Float[Array, "b h w c"]:
    """`x` with `value` in its rows of padding; outside of `strips` as it is."""
    rows = rows_of(x.shape[1])
    if rows == x.shape[1]:
        return x
    # `where`, not a product: what padding became on the way must not get through.
    there = lax.broadcasted_iota(jnp.int32, (1, x.shape[1], 1, 1), 1) < rows
    return jnp.where(there, x, jnp.asarray(value, x.dtype))


def _convolve(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
    """Convolutions that look around a cell see zeros in the padding, as they do outside of an image."""
    module = context.module
    convolves = isinstance(module, nn.Conv | nn.ConvTranspose) and context.method_name == "__call__"
    if convolves and math.prod(module.kernel_size) > 1:
        args = (blanked(args[0]), *args[1:])
    return call(*args, **kwargs)
