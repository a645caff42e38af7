"""The one convolution of all networks: XLA's, but for products of matrices where these are faster on a CPU.

That is the gradient of a kernel, which XLA makes a convolution whose kernel is as large as the map, of transposed
images; a product takes a half to a tenth of the time where the kernel is 1x1, less where it is larger. And what is
dilated so far that much of it falls on padding, as in DeepLabv3's pyramid: products leave the padding out
(docs/performance.md). Elsewhere, and where an image's rows are over devices, everything is XLA's, but for the places of
a kernel that see nothing but padding, which are left out everywhere.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")
_ELSEWHERE = jax.make_user_context(False)
SPARSE = 0.7  # of what a kernel looks at: where less of it is image and not padding, padding is left out
LARGEST_KERNEL = 5  # side, above which XLA's gradient is as fast: the 7 x 7 of a ResNet's first layer


@contextlib.contextmanager
def as_elsewhere() -> Iterator[None]:
    """Programs that are traced inside are those of other devices than CPUs, whichever they are compiled for."""
    with _ELSEWHERE(True):
        yield


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c k"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> Float[Array, "b oh ow k"]:
    """`lax.conv_general_dilated` of images, as `flax.linen.Conv(conv_general_dilated=)` calls it.

    Raises:
      ValueError: groups, dilated images or another layout, which no network has.
    """
    dilated = lhs_dilation is not None and tuple(lhs_dilation) != (1, 1)
    known = lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
    if (
        feature_group_count != 1
        or dilated
        or lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers) != known
    ):
        raise ValueError("convolutions of images (b, h, w, c) without groups and without dilated images are known")
    strides, dilation, padding = tuple(strides), tuple(rhs_dilation or (1, 1)), tuple(map(tuple, padding))
    if not any(map(is_symbolic_dim, x.shape[1:3])):
        kernel, padding = _without_dead_places(x, kernel, strides, padding, dilation)
    return _convolve(x, kernel, strides, padding, dilation, precision)


class Place(NamedTuple):
    """A place of a kernel along an axis: it has image, from pixel `start`, for the outputs from `first` to `last`."""

    at: int
    first: int
    last: int
    start: int

    def of_outputs(self) -> slice:
        return slice(self.first, self.last)

    def of_image(self, stride: int) -> slice:
        return slice(self.start, self.start + (self.last - self.first - 1) * stride + 1, stride)


def places(size: int, taps: int, stride: int, padding: tuple[int, int], dilation: int) -> tuple[list[Place], int]:
    """(the places of a kernel that see any of an axis of `size` pixels, how many outputs there are)."""
    outputs = max(0, (size + sum(padding) - (taps - 1) * dilation - 1) // stride + 1)
    found = []
    for i in range(taps):
        moved = i * dilation - padding[0]
        first, last = max(0, -(moved // stride)), min(outputs, (size - 1 - moved) // stride + 1)
        if first < last:
            found.append(Place(i, first, last, first * stride + moved))
    return found, outputs


def _seen(size: Any, taps: Any, strides: Any, padding: Any, dilation: Any) -> list[tuple[list[Place], int]]:
    """`places` of both axes."""
    return [places(*axis) for axis in zip(size, taps, strides, padding, dilation, strict=True)]


def _sparse(seen: list[tuple[list[Place], int]], taps: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether much of what the places of a dilated kernel look at is padding."""
    looked = math.prod(n * outputs for (_, outputs), n in zip(seen, taps, strict=True))
    image = math.prod(sum(p.last - p.first for p in found) for found, _ in seen)
    return max(dilation) > 1 and 0 < image < SPARSE * looked


def _without_dead_places(
    x: Array, kernel: Array, strides: Any, padding: Any, dilation: Any
) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """(kernel, padding) without the outer rows and columns of the kernel that see nothing but padding."""
    kept, pads = [], []
    for axis, (found, _) in enumerate(_seen(x.shape[1:3], kernel.shape[:2], strides, padding, dilation)):
        taps, (low, high), step = kernel.shape[axis], padding[axis], dilation[axis]
        first, last = (found[0].at, found[-1].at) if found else (0, taps - 1)
        kept.append(slice(first, last + 1))
        pads.append((low - first * step, high - (taps - 1 - last) * step))
    return kernel[tuple(kept)], tuple(pads)


def _native(x: Array, kernel: Array, strides: Any, padding: Any, dilation: Any, precision: Any) -> Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT, precision=precision
    )


def _by_places(x: Array, kernel: Array, strides: Any, padding: Any, dilation: Any, precision: Any) -> Array:
    """The convolution as a sum over the kernel's places of products with what each sees of the image."""
    (rows, oh), (columns, ow) = _seen(x.shape[1:3], kernel.shape[:2], strides, padding, dilation)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.zeros((x.shape[0], oh, ow, kernel.shape[-1]), dtype)
    for i in rows:
        for j in columns:
            seen = x[:, i.of_image(strides[0]), j.of_image(strides[1])]
            part = lax.dot_general(
                seen, kernel[i.at, j.at], (((3,), (0,)), ((), ())), precision=precision, preferred_element_type=dtype
            )
            total += jnp.pad(part, ((0, 0), (i.first, oh - i.last), (j.first, ow - j.last), (0, 0)))
    return total.astype(x.dtype)


def _forms(x: Array, kernel: Array, *how: Any) -> tuple[bool, bool]:
    """Whether on a CPU (the convolution and the gradient of its image, that of its kernel) are products."""
    in_strips = jax.sharding.get_abstract_mesh().shape.get("space", 1) > 1
    if in_strips or _ELSEWHERE.value:
        return False, False
    taps, sparse = kernel.shape[:2], False
    if not any(map(is_symbolic_dim, x.shape[1:3])):
        sparse = _sparse(_seen(x.shape[1:3], taps, *how[:3]), taps, how[2])
    return sparse, sparse or max(taps) <= LARGEST_KERNEL


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _convolve(x: Array, kernel: Array, *how: Any) -> Array:
    if not _forms(x, kernel, *how)[0]:
        return _native(x, kernel, *how)
    by_places, native = (lambda x, kernel, f=f: f(x, kernel, *how) for f in (_by_places, _native))
    return lax.platform_dependent(x, kernel, cpu=by_places, default=native)


def _forward(x: Array, kernel: Array, *how: Any) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, *how), (x, kernel)


def _backward(strides: Any, padding: Any, dilation: Any, precision: Any, saved: Any, g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    how = (strides, padding, dilation, precision)

    def of_image(form: Any) -> Any:
        return lambda kernel, g: jax.linear_transpose(lambda x: form(x, kernel, *how), x)(g)[0]

    def native(x: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda kernel: _native(x, kernel, *how), kernel)(g)[0]

    def products(x: Array, g: Array) -> Array:
        return kernel_gradient(x, g, kernel.shape[:2], strides, padding, dilation, precision).astype(kernel.dtype)

    of_x, of_kernel = of_image(_native), native
    by_places, by_products = _forms(x, kernel, *how)
    if by_places:
        of_x = partial(lax.platform_dependent, cpu=of_image(_by_places), default=of_x)
    if by_products:
        of_kernel = partial(lax.platform_dependent, cpu=products, default=of_kernel)
    return of_x(kernel, g), of_kernel(x, g)


_convolve.defvjp(_forward, _backward)


def kernel_gradient(
    x: Float[Array, "b h w c"],
    g: Float[Array, "b oh ow k"],
    size: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    precision: Any = None,
) -> Float[Array, "kh kw c k"]:
    """The gradient of a convolution's kernel of `size`, by products of matrices; in float32 at least.

        dW[i, j] = sum over (b, p, q) of x[b, p strides + i dilation, q strides + j dilation] g[b, p, q]^T

    Without strides, where the size stays and little is padding: shifts of x along the height beside one another, and of
    g along the width, and one product of both, which is large enough for a processor to be fast. Else a product for
    each place of the kernel, of what it sees of the image.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, g = x.astype(dtype), g.astype(dtype)
    (_, h, w, c), (_, oh, ow, k), (kh, kw) = x.shape, g.shape, size

    def padded(x: Array, axis: int, low: int, high: int) -> Array:
        """With zeros at both ends of an axis, or, where these are negative, without what is there."""
        return lax.pad(x, jnp.zeros((), dtype), [(low, high, 0) if i == axis else (0, 0, 0) for i in range(4)])

    def product(x: Array, g: Array) -> Array:
        x, g = (y.reshape(-1, y.shape[-1]) for y in (x, g))
        return lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision=precision)

    seen = _seen((h, w), size, strides, padding, dilation)
    same = tuple(strides) == (1, 1) and (oh, ow) == (h, w)
    if same and (kh, kw) != (1, 1) and not _sparse(seen, size, dilation):
        (above, below), (left, right) = padding
        x = padded(x, 1, above, below)
        # x moved by j - left against g is g moved by left - j against x.
        g = padded(g, 2, right, left)
        rows = jnp.concatenate(
            [lax.slice_in_dim(x, i * dilation[0], i * dilation[0] + h, axis=1) for i in range(kh)], -1
        )
        starts = [left + right - j * dilation[1] for j in range(kw)]
        moved = jnp.concatenate([lax.slice_in_dim(g, start, start + w, axis=2) for start in starts], -1)
        return product(rows, moved).reshape(kh, c, kw, k).transpose(0, 2, 1, 3)

    (rows, _), (across, _) = seen
    of = {
        (i.at, j.at): product(
            x[:, i.of_image(strides[0]), j.of_image(strides[1])], g[:, i.of_outputs(), j.of_outputs()]
        )
        for i in rows
        for j in across
    }
    nothing = jnp.zeros((c, k), dtype)
    return jnp.stack([of.get((i, j), nothing) for i in range(kh) for j in range(kw)]).reshape(kh, kw, c, k)
