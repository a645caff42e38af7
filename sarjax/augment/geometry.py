"""Random geometry on device: one draw per row, shared by everything that the row holds.

Every transform here maps axes to axes (flips, quarter turns, crops, zooms), so a draw is two coordinate
vectors, one per image axis, and then perhaps flips and a transposition: resampling is separable and needs no 2-d
gather, and flips and transpositions are chosen among what is there, which takes a tenth of the time of a gather.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray

from sarjax.augment.keys import row_keys
from sarjax.config import Augment
from sarjax.spec import IGNORE_LABEL

LABELS = ("label", "hidden_label")


class View(NamedTuple):
    """What is drawn for one row. Coordinates are in pixels of the tile, 0 = centre of the first pixel.

    y, x: where the rows and columns of the view lie in the tile, ascending. flip_y, flip_x: whether they are then
    reversed. transpose, swap: whether axes, after that, and dates are swapped.
    """

    y: Float[Array, " rows"]
    x: Float[Array, " columns"]
    flip_y: Bool[Array, ""]
    flip_x: Bool[Array, ""]
    transpose: Bool[Array, ""]
    swap: Bool[Array, ""]


def is_identity(options: Augment) -> bool:
    """Whether `options` ask for no geometry at all."""
    return not (options.crop or options.flip or options.rotate or resamples(options) or options.swap_dates)


def resamples(options: Augment) -> bool:
    """Whether a view's pixels lie between those of the tile."""
    return bool(options.scale or options.region)


def geometry(batch: Mapping[str, Array], key: PRNGKeyArray, options: Augment) -> dict[str, Array]:
    """Draws one view per row and applies it to all images, valid masks and labels of the row.

    flip, rotate: uniform over the symmetries that they generate (both: the eight of the square). A view that is not
    square (a whole tile of other height than width; a crop is always square) keeps its shape: `rotate` is then 0 or
    180 degrees. crop: side of the view, at a uniform whole-pixel position; a tile smaller than the view is placed at
    random inside it. scale: the view shows a region 1/f times its size, f log-uniform in [1/(1+scale), 1+scale]:
    f > 1 enlarges. region: the view shows a part of the tile whose sides are a uniform share in [region, 1] of what
    fits (the largest part of the view's proportions), at a uniform place: never anything outside. swap_dates: reverses
    the dates with probability 1/2.

    Resampling: without scale and region stored values only move. With either, images are bilinear over *valid* pixels
    (weights renormalised; integers rounded), valid masks and labels nearest, so no class is invented. No
    antialiasing: where the view shrinks, speckle is thinned out rather than averaged; a tie in rounding may fall either
    way on another mesh. What lies outside the tile is 0 in images, 0 in valid masks and 255 in labels.

    Args:
      batch: images (b, t, h, w, c), each with its `<name>_valid` (b, t, h, w), `label` and `hidden_label` (b, h, w),
        and `row` (b,) int32, the index in the global batch. Other keys pass through.
      key: one key for the global batch; rows fold their index into it.
      options: see `Augment`.

    Returns:
      A batch of the same keys and dtypes; h = w = crop where options.crop > 0. The very same arrays if `options` ask
      for nothing.
    """
    if is_identity(options):
        return dict(batch)
    # By rank, as `row` and `row_valid` look like an image and its mask.
    images = [name for name, array in batch.items() if array.ndim == 5]
    names = [*images, *(f"{name}_valid" for name in images), *(name for name in LABELS if name in batch)]
    spatial = {name: batch[name] for name in names}
    h, w = batch[f"{images[0]}_valid"].shape[-2:]

    def one_row(row, row_key):
        return apply_view(row, draw_view(row_key, h, w, options), options)

    return dict(batch) | _in_place(jax.vmap(one_row)(spatial, row_keys(key, batch)))


def _in_place(batch: dict[str, Array]) -> dict[str, Array]:
    """Views where tiles were: rows over "data" and "fsdp", heights over "space" of the mesh that is set, if one is.

    Where a view takes its lines from is drawn: the compiler gathers the tile for it, and what has been gathered it
    leaves so: each device would then compute the whole view, and all that follows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("space", 1) == 1:
        return batch

    def place(x: Array) -> Array:
        height = {5: 2, 4: 2, 3: 1}[x.ndim]
        spec = PartitionSpec(("data", "fsdp"), *(None,) * (height - 1), "space")
        return jax.lax.with_sharding_constraint(x, spec)

    return {name: place(x) for name, x in batch.items()}


def draw_view(key: PRNGKeyArray, h: int, w: int, options: Augment) -> View:
    """A random view of a tile of h x w pixels."""
    k_flip, k_rotate, k_scale, k_y, k_x, k_dates = jax.random.split(key, 6)
    rows, columns = (options.crop, options.crop) if options.crop else (h, w)
    factor = 1.0
    if options.scale:
        limit = jnp.log1p(options.scale)
        factor = jnp.exp(jax.random.uniform(k_scale, minval=-limit, maxval=limit))
    elif options.region:
        factor = max(rows / h, columns / w) / jax.random.uniform(k_scale, minval=options.region)
    y, x = _axis(k_y, h, rows, factor), _axis(k_x, w, columns, factor)

    flip_y, flip_x = jax.random.bernoulli(k_flip, shape=(2,)) & options.flip
    turns = jax.random.randint(k_rotate, (), 0, 4) if options.rotate else jnp.int32(0)
    if rows != columns:
        turns = turns & 2
    # After the transposition a quarter turn is one more flip; flips and turns together reach all eight symmetries.
    flip_y, flip_x = flip_y ^ (turns >= 2), flip_x ^ ((turns == 1) | (turns == 2))
    swap = jax.random.bernoulli(k_dates) & options.swap_dates
    return View(y, x, flip_y, flip_x, turns % 2 == 1, swap)


def _axis(key: PRNGKeyArray, size: int, view: int, factor: Float[Array, ""] | float) -> Float[Array, " view"]:
    """Coordinates of `view` samples, 1/factor pixels apart, of a region placed at random along an axis of `size`."""
    if isinstance(factor, float):
        start = jax.random.randint(key, (), min(0, size - view), max(0, size - view) + 1)
        return start.astype(jnp.float32) + jnp.arange(view, dtype=jnp.float32)
    slack = size - view / factor
    start = slack * jax.random.uniform(key)
    return start + (jnp.arange(view) + 0.5) / factor - 0.5


def apply_view(row: Mapping[str, Array], view: View, options: Augment) -> dict[str, Array]:
    """Applies a view to one row: images (t, h, w, c), valid masks (t, h, w), labels (h, w)."""
    out, moves = {}, bool(options.crop) or resamples(options)
    if moves:  # lines that are looked up may as well be looked up in reverse
        y, x = (jnp.where(flip, at[::-1], at) for flip, at in ((view.flip_y, view.y), (view.flip_x, view.x)))
        view = view._replace(y=y, x=x)
    for name, array in row.items():
        axes, outside = ((0, 1), IGNORE_LABEL) if name in LABELS else ((1, 2), 0)
        if f"{name}_valid" in row and resamples(options):
            array = _bilinear(array, row[f"{name}_valid"], view)
        elif moves:
            array = _nearest(array, view, axes, outside)
        else:
            array = _flip(array, view, axes)
        if array.shape[axes[0]] == array.shape[axes[1]]:
            array = jnp.where(view.transpose, jnp.swapaxes(array, *axes), array)
        if options.swap_dates and name not in LABELS:
            array = jnp.where(view.swap, array[::-1], array)
        out[name] = array
    return out


def _flip(array: Num[Array, "..."], view: View, axes: tuple[int, int]) -> Num[Array, "..."]:
    for flip, axis in zip((view.flip_y, view.flip_x), axes, strict=True):
        array = jnp.where(flip, jnp.flip(array, axis), array)
    return array


def _nearest(array: Num[Array, "..."], view: View, axes: tuple[int, int], outside: int) -> Num[Array, "..."]:
    for axis, at in zip(axes, (view.y, view.x), strict=True):
        index, size = jnp.floor(at + 0.5).astype(jnp.int32), array.shape[axis]
        # One line more stands for all that is outside: a choice by coordinates would compute them for every pixel.
        array = jnp.pad(array, [(0, int(i == axis)) for i in range(array.ndim)], constant_values=outside)
        index = jnp.where((index >= 0) & (index < size), index, size)
        array = array.at[(slice(None),) * axis + (index,)].get(mode="promise_in_bounds")
    return array


def _bilinear(image: Num[Array, "t h w c"], valid: Num[Array, "t h w"], view: View) -> Num[Array, "t p q c"]:
    """sum w v x / sum w v over the four neighbours; 0 where the nearest pixel is not valid.

    Sums by a product with a banded matrix per axis: on a CPU three times as fast as gathering the neighbours.
    """
    # The nearest neighbour has at least a quarter of the weight, so the quotient is well conditioned.
    keep = (valid > 0)[..., None]
    parts = jnp.concatenate([jnp.where(keep, image.astype(jnp.float32), 0.0), keep.astype(jnp.float32)], axis=-1)
    # Bands between lines and columns, so that each axis is one large product.
    parts = jnp.swapaxes(parts, 2, 3)
    t, h, bands, w = parts.shape
    down, across = _weights(view.y, h), _weights(view.x, w)
    parts = jnp.matmul(parts, across.T, precision=lax.Precision.HIGHEST)
    parts = jnp.matmul(down, parts.reshape(t, h, -1), precision=lax.Precision.HIGHEST)
    parts = jnp.swapaxes(parts.reshape(t, len(down), bands, -1), 2, 3)
    shown = _nearest(valid, view, (1, 2), 0)[..., None] > 0
    out = jnp.where(shown, parts[..., :-1] / jnp.where(shown, parts[..., -1:], 1.0), 0.0)
    return (jnp.round(out) if jnp.issubdtype(image.dtype, jnp.integer) else out).astype(image.dtype)


def _weights(at: Float[Array, " n"], size: int) -> Float[Array, "n size"]:
    """Of linear interpolation between pixels 0..size - 1 at `at`; 0 outside."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(at[:, None] - jnp.arange(size)))
