"""PSPNet (Zhao, Shi, Qi, Wang, Jia, CVPR 2017) in the layout whose costs Cheng et al. print."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.models.layers import AdaptiveAvgPool, BatchNorm, PReLU, ReLU, conv, kaiming_fan_in, scaled
from sarjax.models.resampling import resize_bilinear
from sarjax.models.resnet import channels_of
from sarjax.models.segmenters import PixelClassifier, Prediction, build_encoder, by_stride, resized, whole_image
from sarjax.options import PSPNet


class PyramidPooling(nn.Module):
    """relu conv([up(conv_n(means over n x n bins)) for n in bins] + [x]), all convolutions 1x1.

    A level's convolution keeps the channels and has neither bias nor norm; the bottleneck goes from all levels and x
    to `channels`, with bias. Bins overlap where n does not divide the size.
    """

    bins: tuple[int, ...]
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w k"]:
        _, h, w, c = x.shape
        levels = []
        for i, side in enumerate(self.bins):
            means = AdaptiveAvgPool(side, name=f"pool_{i}")(x)
            level = conv(c, init=kaiming_fan_in, dtype=self.dtype, name=f"level_{i}")(means)
            levels.append(resize_bilinear(level, (h, w), bins=True))
        x = jnp.concatenate([*levels, x], -1)
        x = conv(self.channels, bias=True, init=kaiming_fan_in, dtype=self.dtype, name="bottleneck")(x)
        return ReLU(name="relu")(x)


class Upsample(nn.Module):
    """prelu bn conv3x3(up(x)): bilinear to `size`, then a convolution with bias, as the layout has it."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int], train: bool) -> Float[Array, "b oh ow k"]:
        x = resize_bilinear(x, size)
        x = conv(self.channels, 3, bias=True, init=kaiming_fan_in, dtype=self.dtype, name="conv")(x)
        return PReLU(name="prelu")(BatchNorm(dtype=self.dtype, name="bn")(x, train))


class PSPNetSegmenter(PixelClassifier):
    """Encoder, `PyramidPooling`, an `Upsample` per doubling of the size, 1x1 classifier.

    Where the doublings do not end at the input's size the logits are resized to it. The public layout drops channels
    at random (0.3 after the pyramid, 0.15 after each upsampling) and ends on a log-softmax; both are left out, the
    second because the logits' softmax is the same. `auxiliary`, of the stage before the last, is an FCN head's.
    """

    bins: tuple[int, ...]
    channels: int
    upsampling: tuple[int, ...]
    auxiliary_channels: int | None
    num_classes: int
    dtype: Any = jnp.float32

    def setup(self):
        dtype = self.dtype
        self.pyramid = PyramidPooling(self.bins, self.channels, dtype=dtype)
        self.up = [Upsample(channels, dtype=dtype) for channels in self.upsampling]
        self.classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=dtype)
        if self.auxiliary_channels is not None:
            self.auxiliary_conv = conv(self.auxiliary_channels, 3, init=kaiming_fan_in, dtype=dtype)
            self.auxiliary_bn = BatchNorm(dtype=dtype)
            self.auxiliary_relu = ReLU()
            self.auxiliary_classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=dtype)

    @property
    def context(self) -> FieldOfView:
        return whole_image(self.encoder)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        stages = self.encoder(x, train)
        size, stride = x.shape[1:3], self.context.alignment
        embedding = self.pyramid(stages["c4"])
        for up in self.up:
            stride //= 2
            # Twice the size, but for inputs that the stride does not divide: so the last one is the input's.
            embedding = up(embedding, tuple(-(-side // stride) for side in size), train)
        auxiliary = None
        if self.auxiliary_channels is not None:
            y = self.auxiliary_relu(self.auxiliary_bn(self.auxiliary_conv(stages["c3"]), train))
            auxiliary = resized(self.auxiliary_classifier(y), size)
        features = by_stride(stages, self.encoder.strides)
        return Prediction(self.classify(embedding, size), auxiliary, features, features, embedding)


def build_pspnet(options: PSPNet, num_classes: int, dtype: Any) -> PSPNetSegmenter:
    if not options.bins or min(options.bins) < 1:
        raise UserError(f"bins are {list(options.bins)}, but should be one or more whole numbers from 1.")
    doublings = options.output_stride.bit_length() - 1
    if len(options.upsampling) > doublings:
        raise UserError(
            f"upsampling has {len(options.upsampling)} stages, but output stride {options.output_stride} leaves room "
            f"for {doublings}."
        )
    auxiliary_channels = max(1, channels_of(options.encoder, options.width, 3) // 4)
    return PSPNetSegmenter(
        encoder=build_encoder(options, 4, dtype),
        bins=tuple(options.bins),
        channels=scaled(options.channels, options.width),
        upsampling=tuple(scaled(channels, options.width) for channels in options.upsampling),
        auxiliary_channels=auxiliary_channels if options.auxiliary else None,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
    )
