"""What networks are made of: convolution, batch-norm, activations and pools as modules, equal to PyTorch's.

Activations and pools are modules, although they have no parameters, so that `sarjax.models.cost` sees them and their
sharing; resampling that PyTorch networks call as functions is in `sarjax.models.resampling`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.models import resampling
from sarjax.models.convolution import convolve

# Kaiming-normal of the fan-out: what torchvision's ResNets start from, std = sqrt(2 / (kernel area * outputs)).
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Kaiming-normal of the fan-in, for heads: by its few outputs a classifier would start far from 0.
kaiming_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def scaled(channels: int, width: float) -> int:
    """`channels` times a width multiplier, at least 1."""
    return max(1, round(channels * width))


def conv(
    features: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = False,
    init: Any = kaiming_fan_out,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A square convolution with PyTorch's symmetric padding, dilation * (kernel - 1) / 2 on every side.

    "SAME" would pad a strided convolution on the far side only. Biases start at 0. Parameters are float32, the
    computation runs in `dtype`. No bias by default: a batch-norm that follows would remove it.
    """
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=dilation,
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    momentum: the share of the old running value that is kept (flax's convention: 1 - PyTorch's momentum).
    dtype: of the output; mean and variance are taken in float32.

    Unlike `nn.BatchNorm` the running variance is the unbiased one, n / (n - 1) times the variance that normalises.
    With n = 1 that factor is taken as 1 (PyTorch raises). Under jit over a sharded batch the statistics are those of
    the global batch.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"], train: bool) -> Float[Array, "*rows c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if not train:
            mean, var = running_mean.value, running_var.value
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            y = (x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
            return y.astype(self.dtype)
        y, mean, var = normalised(x, scale, bias, self.epsilon)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            n = x.size // channels
            kept = self.momentum
            running_mean.value = kept * running_mean.value + (1 - kept) * mean
            running_var.value = kept * running_var.value + (1 - kept) * var * (n / max(n - 1, 1))
        return y.astype(self.dtype)


def normalised(
    x: Float[Array, "*rows c"], scale: Float[Array, " c"], bias: Float[Array, " c"], epsilon: float
) -> tuple[Float[Array, "*rows c"], Float[Array, " c"], Float[Array, " c"]]:
    """(y, mean, var) with y = scale (x - mean) / sqrt(var + epsilon) + bias, mean and var over all axes but the last.

    In float32 at least; var is the biased one. No gradient flows through the mean and the var that are returned.
    """
    y, mean, var = _normalised(x, scale, bias, epsilon)
    return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalised(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array, Array]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    # Two passes: E[x^2] - E[x]^2 would cancel where the mean exceeds the deviation, as after a pool.
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    return (x - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias, mean, var


def _normalised_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Any, Any]:
    y, mean, var = _normalised(x, scale, bias, epsilon)
    return (y, mean, var), (x, scale, mean, jax.lax.rsqrt(var + epsilon))


def _normalised_backward(epsilon: float, saved: Any, gradients: Any) -> tuple[Array, Array, Array]:
    """dx = scale / s (g - mean(g) - z mean(g z)), z = (x - mean) / s: both sums in one pass, and one message.

    Automatic differentiation makes a pass and a message more of it, for the mean inside the variance, whose gradient
    is 0.
    """
    x, scale, mean, inverse = saved
    g = gradients[0]
    axes = tuple(range(x.ndim - 1))
    n = x.size // x.shape[-1]
    z = (x.astype(g.dtype) - mean) * inverse
    of_scale, of_bias = jnp.sum(g * z, axes), jnp.sum(g, axes)
    of_x = (scale * inverse) * (g - of_bias / n - z * (of_scale / n))
    return of_x.astype(x.dtype), of_scale, of_bias


_normalised.defvjp(_normalised_forward, _normalised_backward)


class ReLU(nn.Module):
    """max(x, 0). One instance may be called several times: `sarjax.models.cost` then counts its last call."""

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return nn.relu(x)


class PReLU(nn.Module):
    """x where x > 0, slope * x elsewhere, with one learnt slope; 0.25 at first (PyTorch's)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        slope = self.param("slope", nn.initializers.constant(0.25), (1,), jnp.float32)
        return jnp.where(x > 0, x, slope.astype(x.dtype) * x)


class Sigmoid(nn.Module):
    """1 / (1 + exp(-x))."""

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return nn.sigmoid(x)


class ConvNormReLU(nn.Module):
    """relu bn conv(x), without bias; the size stays. Of heads: the kernel starts by its fan-in."""

    channels: int
    kernel: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w k"]:
        x = conv(
            self.channels, self.kernel, dilation=self.dilation, init=kaiming_fan_in, dtype=self.dtype, name="conv"
        )(x)
        return ReLU(name="relu")(BatchNorm(dtype=self.dtype, name="bn")(x, train))


class MaxPool(nn.Module):
    """Largest value of a square window; padding never wins (it is -inf)."""

    window: int = 3
    stride: int = 2
    padding: int = 1

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
        return resampling.max_pool(x, self.window, self.stride, self.padding)


class AvgPool(nn.Module):
    """Mean of a square window; padding counts as zeros."""

    window: int
    stride: int = 1
    padding: int = 0

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
        return resampling.avg_pool(x, self.window, self.stride, self.padding)


class AdaptiveAvgPool(nn.Module):
    """Means over a grid of side x side bins; 1 = the mean of the whole image."""

    side: int

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b side side c"]:
        return resampling.adaptive_avg_pool(x, (self.side, self.side))
