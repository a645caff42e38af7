"""Resizing, pooling and sampling of images, equal to `torch.nn.functional`, on NHWC arrays.

Heights and widths may be symbolic (`jax.export.symbolic_shape`), up to `LARGEST_SIDE`: weights that are constants of
the program for known sizes are then computed by it, equal up to the rounding of float32.

Inside `sarjax.models.strips` the height of a map may hold padding, which is left out; sizes are then known.
"""

from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.strips import blanked, in_strips, rows_of

# Of a symbolic height or width: products of two sizes and 2 stay within int32.
LARGEST_SIDE = 2**15
LONG = 512  # of a target's sides


def resize_bilinear(
    x: Float[Array, "b h w c"], size: tuple[int, int], *, align_corners: bool = False, bins: bool = False
) -> Float[Array, "b oh ow c"]:
    """Bilinear interpolation to `size` = (height, width), without antialiasing in either direction.

    align_corners=False puts pixel centres at half-integers: source = (target + 1/2) * in / out - 1/2, clamped to the
    image. True maps the first and last centres on each other: source = target * (in - 1) / (out - 1).

    bins: `x` is of `adaptive_avg_pool`, bins of the whole image: only the result may then hold padding, not `x`.

    Two products with constant banded matrices, one per axis: so the gradient is two products too, without a scatter,
    and it partitions over the height, except that `x` is gathered. In strips, where that is what must not be, whole
    factors are sums of neighbours instead (whose gradient takes several times as long on a CPU). So they are to sizes
    above `LONG`, where most of the matrices is zeros; the gradient stays that of the products.
    Computed in float32 at least; returned in the dtype of `x`.
    Equal to `torch.nn.functional.interpolate(mode="bilinear", antialias=False)`.
    """
    if in_strips():
        _refuse_corners(align_corners)
        return _resize_bins(x, size) if bins else _enlarge(_enlarge(x, size[0], 1), size[1], 2).astype(x.dtype)
    if not (align_corners or _symbolic(*x.shape[1:3], *size)) and max(size) > LONG:
        (h, w), (oh, ow) = x.shape[1:3], size
        if oh % h == ow % w == 0:
            return _enlarged(x, (h, w), (oh, ow))
    rows, columns = (
        (_bilinear_weights if _symbolic(n, out) else _bilinear_matrix)(n, out, align_corners)
        for n, out in zip(x.shape[1:3], size, strict=True)
    )
    return _separable(x, rows, columns)


def patch_means(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b _ _ c"]:
    """Means of patches of side x side cells; at least one, and ragged where the size does not divide.

    They are the bins of an adaptive pool to (h // side, w // side).
    """
    # In this order `max` knows the greater of 1 and a symbolic size.
    grid = tuple(max(n // side, 1) for n in x.shape[1:3])
    if in_strips() and grid[0] * side != x.shape[1]:
        raise ValueError(f"a map of {x.shape[1]} rows in strips is not made of patches of {side}")
    return _pooled_by_bins(x, grid)


def adaptive_avg_pool(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b oh ow c"]:
    """Mean over `size` = (oh, ow) bins; bin i covers floor(i * in / out) to ceil((i + 1) * in / out), exclusive.

    Bins overlap where the size does not divide, and repeat pixels where it is larger than the image.
    Equal to `torch.nn.functional.adaptive_avg_pool2d`. In strips the bins are those of the image without its padding.
    """
    if not in_strips():
        return _pooled_by_bins(x, size)
    rows = rows_of(x.shape[1])
    matrix = np.zeros((size[0], x.shape[1]))
    matrix[:, :rows] = _bin_matrix(rows, size[0])
    # Columns first: the sums over rows, which devices add up, are then of few bins.
    y = _along(blanked(x).astype(jnp.promote_types(x.dtype, jnp.float32)), _bin_matrix(x.shape[2], size[1]), 2)
    return _along(y, matrix, 1).astype(x.dtype)


def _pooled_by_bins(x: Array, size: tuple[int, int]) -> Array:
    b, h, w, c = x.shape
    oh, ow = size
    if h % oh == 0 and w % ow == 0:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return x.reshape(b, oh, h // oh, ow, w // ow, c).mean((2, 4), dtype=dtype).astype(x.dtype)
    rows, columns = (
        (_bin_weights if _symbolic(n, out) else _bin_matrix)(n, out) for n, out in zip((h, w), size, strict=True)
    )
    return _separable(x, rows, columns)


def avg_pool(x: Float[Array, "b h w c"], window: int, stride: int, padding: int) -> Float[Array, "b oh ow c"]:
    """Mean of a square window; padding counts as zeros (`torch.nn.functional.avg_pool2d`'s default)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = blanked(x).astype(dtype)
    # Rows, then columns: 2 * window additions instead of window^2.
    for axis in (1, 2):
        windows, strides, pads = [1] * 4, [1] * 4, [(0, 0)] * 4
        windows[axis], strides[axis], pads[axis] = window, stride, (padding, padding)
        y = lax.reduce_window(y, np.zeros((), dtype), lax.add, windows, strides, pads)
    return (y / window**2).astype(x.dtype)


def max_pool(x: Float[Array, "b h w c"], window: int, stride: int, padding: int) -> Float[Array, "b oh ow c"]:
    """Largest value of a square window; padding is -inf (`torch.nn.functional.max_pool2d`).

    Of equal values the first in row-major order gets the gradient, as in PyTorch.
    """
    return _max_pool(blanked(x, -np.inf), window, stride, padding)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window: int, stride: int, padding: int) -> Array:
    # Columns, then rows: a CPU takes less than half as long as for a square window.
    for axis in (2, 1):
        windows, strides, pads = [1] * 4, [1] * 4, [(0, 0)] * 4
        windows[axis], strides[axis], pads[axis] = window, stride, (padding, padding)
        x = lax.reduce_window(x, -np.inf, lax.max, windows, strides, pads)
    return x


def _max_pool_backward(window: int, stride: int, padding: int, x: Array, gradient: Array) -> tuple[Array]:
    # XLA's own gradient, a select-and-scatter, takes three times as long on a CPU as that of shifted slices.
    def pool(x: Array) -> Array:
        for axis in (2, 1):
            pads = [(0, 0, 0)] * 4
            pads[axis] = (padding, padding, 0)
            padded = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), pads)
            length = (x.shape[axis] + 2 * padding - window) // stride * stride + 1
            slices = [lax.slice_in_dim(padded, i, i + length, stride, axis) for i in range(window)]
            # On a tie `where` sends the gradient to the first; `maximum` would halve it.
            x = reduce(lambda first, second: jnp.where(first >= second, first, second), slices)
        return x

    return jax.vjp(pool, x)[1](gradient)


_max_pool.defvjp(lambda x, *window: (_max_pool(x, *window), x), _max_pool_backward)


def grid_sample(
    x: Float[Array, "b h w c"], grid: Float[Array, "b oh ow 2"], *, align_corners: bool = False
) -> Float[Array, "b oh ow c"]:
    """Bilinear samples of `x` at `grid`; outside of the image is 0.

    grid: (x, y) of every sample, -1..1 over the width and the height: over the outer edges of the border pixels, or
    with align_corners over their centres. Equal to `torch.nn.functional.grid_sample(padding_mode="zeros")`.
    The gradient reaches `x` (by a scatter) and `grid`.
    """
    _refuse_corners(align_corners)

    def split(u, n):
        position = (u + 1) / 2 * (n - 1) if align_corners else ((u + 1) * n - 1) / 2
        low = jnp.floor(position)
        return low, position - low

    return _between(x, *split(grid[..., 1], x.shape[1]), *split(grid[..., 0], x.shape[2]), zeros=True)


def offset_sample(x: Float[Array, "b h w c"], offsets: Float[Array, "b oh ow 2"]) -> Float[Array, "b oh ow c"]:
    """Bilinear samples of `x` where `resize_bilinear` to (oh, ow) takes them, moved by `offsets`.

        y[p] = x((p + 1/2) * in / out - 1/2 + offsets[p]), border cells repeated outside

    offsets: (x, y) of every sample, in cells of `x`: to the right and down. Zero offsets give
    `resize_bilinear(x, (oh, ow))` up to the rounding of float32: its two products round in another order.
    Positions are computed in float32 at least and apart from whole cells, so a large map loses no digits; the result
    has the dtype of `x`. The gradient reaches `x` (by a scatter) and `offsets`: at whole cells that to the right and
    down, outside of the image 0.
    """
    _, oh, ow, _ = offsets.shape
    _, h, w, _ = x.shape
    offsets = offsets.astype(jnp.promote_types(offsets.dtype, jnp.float32))

    def split(offset, n, out, shape):
        whole, part = _half_pixel_sources(n, out)
        # No sample comes back into the image from further away, and the cell's number stays a small one.
        moved = part.reshape(shape).astype(offset.dtype) + jnp.clip(offset, -n, n)
        low = jnp.floor(moved)
        return low + whole.reshape(shape).astype(offset.dtype), moved - low

    rows, columns = split(offsets[..., 1], h, oh, (oh, 1)), split(offsets[..., 0], w, ow, (ow,))
    return _between(x, *rows, *columns, zeros=False)


def _between(x: Array, row: Array, down: Array, column: Array, right: Array, *, zeros: bool) -> Array:
    """Means of the cells (row, column), (row + 1, column) and so on, whole numbers, with weights `down` and `right`.

    Outside of the image is 0, or the nearest cell of its border. In float32 at least, as the scatter of the gradient.
    """
    b, h, w, c = x.shape
    _, oh, ow = row.shape
    last = rows_of(h) - 1
    cells = x.reshape(b, h * w, c).astype(jnp.promote_types(x.dtype, jnp.float32))
    result = jnp.zeros((b, oh, ow, c), cells.dtype)
    for i, vertical in ((row, 1 - down), (row + 1, down)):
        for j, horizontal in ((column, 1 - right), (column + 1, right)):
            weight = vertical * horizontal
            if zeros:
                weight = jnp.where((i >= 0) & (i <= last) & (j >= 0) & (j < w), weight, 0)
            index = jnp.clip(i, 0, last).astype(jnp.int32) * w + jnp.clip(j, 0, w - 1).astype(jnp.int32)
            value = jax.vmap(lambda x, k: x.at[k].get(mode="clip"))(cells, index.reshape(b, oh * ow))
            result += weight[..., None] * value.reshape(b, oh, ow, c)
    return result.astype(x.dtype)


def _refuse_corners(align_corners: bool) -> None:
    if align_corners and in_strips():
        raise UserError(
            "this network places samples by the corners of the whole image (corner_aligned), which strips of it do not "
            "have: windows, without --mesh.space, are accepted."
        )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _enlarged(x: Array, before: tuple[int, int], after: tuple[int, int]) -> Array:
    return _enlarge(_enlarge(x, after[0], 1), after[1], 2).astype(x.dtype)


def _enlarged_backward(before: tuple[int, int], after: tuple[int, int], _: None, gradient: Array) -> tuple[Array]:
    rows, columns = (_bilinear_matrix(n, out, False).T for n, out in zip(before, after, strict=True))
    return (_separable(gradient, rows, columns),)


_enlarged.defvjp(lambda x, before, after: (_enlarged(x, before, after), None), _enlarged_backward)


def _enlarge(x: Array, size: int, axis: int) -> Array:
    """`resize_bilinear` along one axis by a whole factor, as sums of neighbours; float32 at least."""
    n = x.shape[axis]
    last = (rows_of(n) if axis == 1 else n) - 1
    factor, rest = divmod(size, n)
    if rest:
        raise ValueError(f"a map of {n} cells in strips does not become {size} by a whole factor")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if factor == 1:
        return x

    def neighbour(step: int, border: int) -> Array:
        padding = [(0, 0, 0)] * x.ndim
        padding[axis] = (-step, step, 0)
        moved = lax.pad(x, jnp.zeros((), x.dtype), padding)
        cells = [1] * x.ndim
        cells[axis] = n
        at_border = lax.broadcasted_iota(jnp.int32, cells, axis) == border
        return jnp.expand_dims(jnp.where(at_border, x, moved), axis + 1)

    shape = [1] * (x.ndim + 1)
    shape[axis + 1] = factor
    offset = ((np.arange(factor) + 0.5) / factor - 0.5).reshape(shape)
    nearest = jnp.where(offset < 0, neighbour(-1, 0), neighbour(1, last))
    x = jnp.expand_dims(x, axis + 1)
    # In this form a constant stays that constant.
    y = x + jnp.asarray(np.abs(offset), x.dtype) * (nearest - x)
    return y.reshape(*y.shape[:axis], size, *y.shape[axis + 2 :])


def _resize_bins(x: Array, size: tuple[int, int]) -> Array:
    """`resize_bilinear` of bins of the whole image; 0 in the rows of padding."""
    (_, h, w, _), (oh, ow) = x.shape, size
    rows = np.zeros((oh, h))
    rows[: rows_of(oh)] = _bilinear_matrix(h, rows_of(oh), False)
    return _separable(x, rows, _bilinear_matrix(w, ow, False))


def _symbolic(*sizes: Any) -> bool:
    return any(map(is_symbolic_dim, sizes))


def _separable(x: Array, rows: Array | np.ndarray, columns: Array | np.ndarray) -> Array:
    """rows @ x @ columns^T for every image and channel. Full precision, so that a constant stays that constant."""
    y = _along(x.astype(jnp.promote_types(x.dtype, jnp.float32)), rows, 1)
    return _along(y, columns, 2).astype(x.dtype)


def _along(x: Array, matrix: Array | np.ndarray, axis: int) -> Array:
    product = {1: "Hh,bhwc->bHwc", 2: "Ww,bhwc->bhWc"}[axis]
    return jnp.einsum(product, matrix.astype(x.dtype), x, precision=lax.Precision.HIGHEST)


@cache
def _bilinear_matrix(n: int, out: int, align_corners: bool) -> np.ndarray:
    """(out, n) weights of linear interpolation, two per row at most."""
    target = np.arange(out, dtype=np.float64)
    if align_corners:
        source = target * ((n - 1) / (out - 1) if out > 1 else 0.0)
    else:
        source = np.maximum((target + 0.5) * (n / out) - 0.5, 0.0)
    low = np.minimum(np.floor(source).astype(int), n - 1)
    high = np.minimum(low + 1, n - 1)
    weight = np.clip(source - low, 0.0, 1.0)
    matrix = np.zeros((out, n))
    np.add.at(matrix, (np.arange(out), low), 1 - weight)
    np.add.at(matrix, (np.arange(out), high), weight)
    return matrix


@cache
def _bin_matrix(n: int, out: int) -> np.ndarray:
    """(out, n) weights of the bins' means."""
    matrix = np.zeros((out, n))
    for i in range(out):
        start, end = i * n // out, -(-(i + 1) * n // out)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _bilinear_weights(n: Any, out: Any, align_corners: bool) -> Array:
    """`_bilinear_matrix` in float32, computed by the program itself, of sizes that may be symbolic."""
    target = lax.iota(jnp.int32, out)
    # In whole numbers: of a source coordinate in the thousands float32 would leave three digits of the weight.
    if align_corners:
        numerator, denominator = target * (n - 1), jnp.maximum(out - 1, 1)
    else:
        numerator, denominator = jnp.maximum((2 * target + 1) * n - out, 0), jnp.asarray(2 * out)
    low = (numerator // denominator)[:, None]
    weight = ((numerator % denominator).astype(jnp.float32) / denominator.astype(jnp.float32))[:, None]
    column = lax.iota(jnp.int32, n)[None]
    high = jnp.minimum(low + 1, n - 1)
    return jnp.where(column == low, 1 - weight, 0.0) + jnp.where(column == high, weight, 0.0)


def _half_pixel_sources(n: Any, out: Any) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """(out,) (target + 1/2) * n / out - 1/2, from -1/2 to n - 1/2, as the whole number below and the rest."""
    if _symbolic(n, out):
        target, period = lax.iota(jnp.int32, out), jnp.asarray(2 * out)
    else:
        target, period = np.arange(out), np.asarray(2 * out)
    numerator = (2 * target + 1) * n - out
    return numerator // period, (numerator % period) / period


def _bin_weights(n: Any, out: Any) -> Array:
    """`_bin_matrix` in float32, computed by the program itself, of sizes that may be symbolic."""
    i = lax.iota(jnp.int32, out)[:, None]
    start, end = i * n // out, ((i + 1) * n + out - 1) // out
    column = lax.iota(jnp.int32, n)[None]
    return jnp.where((column >= start) & (column < end), 1 / (end - start).astype(jnp.float32), 0.0)
