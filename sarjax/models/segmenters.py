"""What every segmentation network has in common, and the plain one: an encoder with an FCN head."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.models.context import FieldOfView
from sarjax.models.layers import BatchNorm, ReLU, conv, kaiming_fan_in
from sarjax.models.resampling import resize_bilinear
from sarjax.models.resnet import ResNet, channels_of
from sarjax.options import FCN, NetworkOptions


class Prediction(NamedTuple):
    """What a network returns.

    logits: (b, h, w, k) float32, at the input's size. auxiliary: logits of the same shape from an earlier point of the
    network for an auxiliary loss, or None. features: {stride: (b, h / stride, w / stride, c)}, as `encode` gives them.
    """

    logits: Float[Array, "b h w k"]
    auxiliary: Float[Array, "b h w k"] | None
    features: dict[int, Float[Array, "b _ _ _"]]


def by_stride(features: Mapping[str, Array], strides: Mapping[str, int]) -> dict[int, Array]:
    """{stride: features} of {stage: features}; of stages with the same stride (dilated ones) the last counts."""
    return {stride: features[stage] for stage, stride in strides.items()}


def build_encoder(options: NetworkOptions, stages: int, dtype: Any) -> ResNet:
    """The ResNet of `options`, cut after `stages`."""
    return ResNet(options.encoder, options.width, options.output_stride, stages, jnp.dtype(dtype))


class Segmenter(nn.Module):
    """What every segmentation network has: an encoder, and its features by stride."""

    encoder: ResNet

    def encode(self, x: Float[Array, "b h w c"], train: bool) -> dict[int, Float[Array, "b _ _ _"]]:
        return by_stride(self.encoder(x, train), self.encoder.strides)


def whole_image(encoder: ResNet) -> FieldOfView:
    """Of a network that looks at means of the whole image: global, aligned to the last stage's stride."""
    return FieldOfView(max(encoder.strides.values()), None)


class FCNSegmenter(Segmenter):
    """Encoder, 3x3 convolution, batch-norm, ReLU, 1x1 classifier, bilinear upsampling (Long et al., CVPR 2015)."""

    channels: int
    num_classes: int
    dtype: Any = jnp.float32

    def setup(self):
        self.conv = conv(self.channels, 3, init=kaiming_fan_in, dtype=self.dtype)
        self.bn = BatchNorm(dtype=self.dtype)
        self.relu = ReLU()
        self.classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=self.dtype)

    @property
    def context(self) -> FieldOfView:
        """Encoder, one 3x3 convolution and the upsampling; aligned to the last stage's stride."""
        last = list(self.encoder.extents.values())[-1]
        return last.convolution(3).upsampled(1).field_of_view(last.stride)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        features = self.encode(x, train)
        last = features[max(features)]
        scores = self.classifier(self.relu(self.bn(self.conv(last), train)))
        return Prediction(resize_bilinear(scores.astype(jnp.float32), x.shape[1:3]), None, features)


def build_fcn(options: FCN, num_classes: int, dtype: Any) -> FCNSegmenter:
    channels = options.channels or max(1, channels_of(options.encoder, options.width, options.stages) // 4)
    return FCNSegmenter(build_encoder(options, options.stages, dtype), channels, num_classes, jnp.dtype(dtype))
