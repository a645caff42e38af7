"""Masks that hide parts of an image from one sensor and never from both (asymmetric masking, Han et al.)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray


class Masks(NamedTuple):
    """True where a sensor sees the image."""

    optical: Bool[Array, "b h w"]
    sar: Bool[Array, "b h w"]


def asymmetric_masks(keys: PRNGKeyArray, h: int, w: int, *, cell: int, optical: float, sar: float) -> Masks:
    """One uniform draw u per cell: optical loses it where u < optical, SAR where u >= 1 - sar.

    With optical + sar <= 1 every cell is seen by at least one of them.

    Args:
      keys: (b,), one per row.
      h, w: of the images; cells at the lower and right border may be cut.
      cell: side in pixels.
      optical, sar: share of cells that each loses.

    Raises:
      ValueError: the shares add up to more than 1.
    """
    if optical + sar > 1:
        raise ValueError(f"shares of {optical} and {sar} would hide some cells from both")
    u = jax.vmap(lambda key: jax.random.uniform(key, (-(-h // cell), -(-w // cell))))(keys)
    u = jnp.repeat(jnp.repeat(u, cell, 1), cell, 2)[:, :h, :w]
    return Masks(u >= optical, u < 1 - sar)
