"""LANet: local attention embedding (Ding, Tang, Bruzzone, TGRS 2021), as Cheng et al. use it on ResNet-18."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.context import Extent, FieldOfView
from sarjax.models.layers import AvgPool, BatchNorm, ReLU, Sigmoid, conv, kaiming_fan_in, scaled
from sarjax.models.resampling import adaptive_avg_pool, patch_means, resize_bilinear
from sarjax.models.segmenters import Prediction, Segmenter, build_encoder, by_stride, resized
from sarjax.options import LANet

# The public code gives its own batch-norms PyTorch's momentum 0.95: running statistics follow the last few batches.
MOMENTUM = 0.05
EMBEDDING_WINDOW = 6


class Attention(nn.Module):
    """sigmoid(conv_u relu bn conv_d(x)): 1x1 convolutions down to `hidden` and up to `channels`, both with bias."""

    hidden: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w k"]:
        x = conv(self.hidden, bias=True, init=kaiming_fan_in, dtype=self.dtype, name="down")(x)
        x = ReLU(name="relu")(BatchNorm(MOMENTUM, dtype=self.dtype, name="bn")(x, train))
        x = conv(self.channels, bias=True, init=kaiming_fan_in, dtype=self.dtype, name="up")(x)
        return Sigmoid(name="sigmoid")(x)


class PatchAttention(nn.Module):
    """x + x * up(A), A = attention of the patch means of x.

    window: side of a patch in cells; the means are those of an adaptive pool to (h // window, w // window), at least
    1, so patches are ragged where the size does not divide. 0 = the whole image is one patch: with the residual, x
    plus its squeeze-and-excitation (Hu et al., CVPR 2018). reduction: channels per hidden channel.
    residual: False leaves out the "x +".
    """

    window: int
    reduction: int
    residual: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        _, h, w, c = x.shape
        means = patch_means(x, self.window) if self.window else adaptive_avg_pool(x, (1, 1))
        attention = Attention(max(1, c // self.reduction), c, self.dtype, name="attention")(means, train)
        attended = x * resize_bilinear(attention, (h, w), bins=not self.window)
        return x + attended if self.residual else attended


class AttentionEmbedding(nn.Module):
    """low * up(A), A = attention of the local means of `high`: what high-level features say about low-level ones.

    window: even; the means are over (window + 1)^2 cells, padding counted as zeros. reduction: channels of `high` per
    hidden channel. residual: adds `low` (Cheng et al.; not in the public LANet code). Gradients reach `high`: LANet
    stops them outside.
    """

    reduction: int
    window: int = EMBEDDING_WINDOW
    residual: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, high: Float[Array, "b hh hw k"], low: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b h w c"]:
        means = AvgPool(self.window + 1, 1, self.window // 2, name="pool")(high)
        hidden = max(1, high.shape[-1] // self.reduction)
        attention = Attention(hidden, low.shape[-1], self.dtype, name="attention")(means, train)
        attended = low * resize_bilinear(attention, low.shape[1:3])
        return low + attended if self.residual else attended


class LANetSegmenter(Segmenter):
    """Patch attention on low and high features, embedding of high into low, and the sum of both branches' logits.

    low_channels, high_channels: of the branches. The rest as in `sarjax.options.LANet`.
    `auxiliary` of the prediction are the high branch's logits, `embedding` is the low branch beside the high one
    resized to it. There is no `classify`: each branch has its classifier, and the sum is taken at the input's size.
    """

    low_channels: int
    high_channels: int
    low_window: int
    high_window: int
    low_reduction: int
    high_reduction: int
    residual: bool
    num_classes: int
    dtype: Any = jnp.float32

    def setup(self):
        dtype = self.dtype
        self.high_conv = conv(self.high_channels, init=kaiming_fan_in, dtype=dtype)
        self.high_bn = BatchNorm(MOMENTUM, dtype=dtype)
        self.high_relu = ReLU()
        self.high_attention = PatchAttention(self.high_window, self.high_reduction, dtype=dtype)
        self.low_conv = conv(self.low_channels, bias=True, init=kaiming_fan_in, dtype=dtype)
        self.low_bn = BatchNorm(MOMENTUM, dtype=dtype)
        self.low_relu = ReLU()
        self.low_attention = PatchAttention(self.low_window, self.low_reduction, dtype=dtype)
        self.embedding = AttentionEmbedding(self.high_reduction, residual=self.residual, dtype=dtype)
        self.low_classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=dtype)
        self.high_classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=dtype)

    @property
    def context(self) -> FieldOfView:
        """Aligned to the patches of both attentions (32 pixels by default), within which a mean is one for all cells.

        The high branch looks furthest: its patches' means are interpolated, averaged over 7 x 7 cells by the
        embedding, and interpolated twice more on the way up. A window of 0 looks at the whole image.
        """
        extents = self.encoder.extents
        last, first = extents[f"c{self.encoder.stages}"], extents["c1"]
        periods = last.stride, last.stride * max(self.high_window, 1), first.stride * max(self.low_window, 1)
        if not (self.low_window and self.high_window):
            return FieldOfView(math.lcm(*periods), None)
        high, low = _attended(last, self.high_window), _attended(first, self.low_window)
        embedded = low.joined(high.convolution(EMBEDDING_WINDOW + 1).upsampled(low.stride))
        return embedded.upsampled(1).joined(high.upsampled(1)).field_of_view(*periods)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        stages = self.encoder(x, train)
        high = self.high_relu(self.high_bn(self.high_conv(stages[f"c{self.encoder.stages}"]), train))
        high = self.high_attention(high, train)
        low = self.low_relu(self.low_bn(self.low_conv(stages["c1"]), train))
        low = self.low_attention(low, train)
        # The embedding describes the high features; it must not shape them (as in the public code).
        low = self.embedding(jax.lax.stop_gradient(high), low, train)
        low_logits, high_logits = (
            resized(scores, x.shape[1:3]) for scores in (self.low_classifier(low), self.high_classifier(high))
        )
        features = by_stride(stages, self.encoder.strides)
        embedding = jnp.concatenate([low, resize_bilinear(high, low.shape[1:3])], -1)
        return Prediction(low_logits + high_logits, high_logits, features, features, embedding)


def _attended(extent: Extent, window: int) -> Extent:
    """What a cell reads after a `PatchAttention`: itself, and the patches that its weight is interpolated from."""
    return extent.joined(extent.patches(window).upsampled(extent.stride))


def build_lanet(options: LANet, num_classes: int, dtype: Any) -> LANetSegmenter:
    for name in ("low_window", "high_window"):
        if (window := getattr(options, name)) < 0:
            raise UserError(f"{name} is {window}, but should be the side of a patch in cells or 0, the whole image.")
    return LANetSegmenter(
        encoder=build_encoder(options, options.stages, dtype),
        low_channels=scaled(64, options.width),
        high_channels=scaled(options.channels, options.width),
        low_window=options.low_window,
        high_window=options.high_window,
        low_reduction=options.low_reduction,
        high_reduction=options.high_reduction,
        residual=options.residual,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
    )
