"""The one convolution of all networks: XLA's, but for the gradient of its kernel on a CPU.

There XLA makes that gradient a convolution whose kernel is as large as the map, of transposed images; a product of
matrices takes a half to a tenth of the time where the kernel is 1x1, less where it is larger (docs/performance.md).
Elsewhere, and where an image's rows are over devices, everything is XLA's.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")
_ELSEWHERE = jax.make_user_context(False)
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
    return _convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)), tuple(rhs_dilation or (1, 1)), precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _convolve(x: Array, kernel: Array, strides: Any, padding: Any, dilation: Any, precision: Any) -> Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT, precision=precision
    )


def _forward(x: Array, kernel: Array, *how: Any) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, *how), (x, kernel)


def _backward(strides: Any, padding: Any, dilation: Any, precision: Any, saved: Any, g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    how = (strides, padding, dilation, precision)
    (of_x,) = jax.linear_transpose(lambda x: _convolve.fun(x, kernel, *how), x)(g)

    def native(x: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda kernel: _convolve.fun(x, kernel, *how), kernel)(g)[0]

    def products(x: Array, g: Array) -> Array:
        return kernel_gradient(x, g, kernel.shape[:2], strides, padding, dilation, precision).astype(kernel.dtype)

    in_strips = jax.sharding.get_abstract_mesh().shape.get("space", 1) > 1
    if max(kernel.shape[:2]) > LARGEST_KERNEL or in_strips or _ELSEWHERE.value:
        return of_x, native(x, g)
    return of_x, lax.platform_dependent(x, g, cpu=products, default=native)


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

    Without strides, and where the size stays: shifts of x along the height beside one another, and of g along the
    width, and one product of both, which is large enough for a processor to be fast. Else a product for each place of
    the kernel.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, g = x.astype(dtype), g.astype(dtype)
    (b, h, w, c), (_, oh, ow, k), (kh, kw) = x.shape, g.shape, size
    columns = (0, 0), (0, 0)

    def product(x: Array, g: Array) -> Array:
        x, g = (y.reshape(-1, y.shape[-1]) for y in (x, g))
        return lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision=precision)

    if tuple(strides) == (1, 1) and (oh, ow) == (h, w) and (kh, kw) != (1, 1):
        (above, below), (left, right) = padding
        x = jnp.pad(x, (columns[0], (above, below), *columns))
        # x moved by j - left against g is g moved by left - j against x.
        g = jnp.pad(g, (*columns, (right, left), columns[0]))
        rows = jnp.concatenate(
            [lax.slice_in_dim(x, i * dilation[0], i * dilation[0] + h, axis=1) for i in range(kh)], -1
        )
        starts = [left + right - j * dilation[1] for j in range(kw)]
        moved = jnp.concatenate([lax.slice_in_dim(g, start, start + w, axis=2) for start in starts], -1)
        return product(rows, moved).reshape(kh, c, kw, k).transpose(0, 2, 1, 3)

    x = jnp.pad(x, (columns[0], *padding, columns[0]))

    def seen(i: int, j: int) -> Array:
        """What place (i, j) of the kernel sees."""
        start = (0, i * dilation[0], j * dilation[1], 0)
        end = (b, start[1] + (oh - 1) * strides[0] + 1, start[2] + (ow - 1) * strides[1] + 1, c)
        return lax.slice(x, start, end, (1, *strides, 1))

    places = [product(seen(i, j), g) for i in range(kh) for j in range(kw)]
    return jnp.stack(places).reshape(kh, kw, c, k)
