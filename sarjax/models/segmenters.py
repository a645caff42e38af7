"""What every segmentation network has in common, and the plain one: an encoder with an FCN head."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

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
    For distillation: pyramid, maps in the form of `features`, fine to coarse: the network's own feature pyramid, or
    `features` again where it has none. embedding: (b, h', w', c), what the classifier reads.
    """

    logits: Float[Array, "b h w k"]
    auxiliary: Float[Array, "b h w k"] | None
    features: dict[int, Float[Array, "b _ _ _"]]
    pyramid: dict[int, Float[Array, "b _ _ _"]]
    embedding: Float[Array, "b _ _ _"]
    by_date: dict[int, Float[Array, "b t _ _ _"]] | None = None


def by_stride(features: Mapping[str, Array], strides: Mapping[str, int]) -> dict[int, Array]:
    """{stride: features} of {stage: features}; of stages with the same stride (dilated ones) the last counts."""
    return {stride: features[stage] for stage, stride in strides.items()}


def build_encoder(options: NetworkOptions, stages: int, dtype: Any) -> ResNet:
    """The ResNet of `options`, cut after `stages`."""
    return ResNet(options.encoder, options.width, options.output_stride, stages, jnp.dtype(dtype))


class Segmenter(nn.Module):
    """What every segmentation network has: an encoder, and its features by stride.

    classifies: the network has one classifier, and `classify` (`PixelClassifier`).
    """

    classifies: ClassVar[bool] = False
    encoder: ResNet

    def encode(self, x: Float[Array, "b h w c"], train: bool) -> dict[int, Float[Array, "b _ _ _"]]:
        return by_stride(self.encoder(x, train), self.encoder.strides)


class PixelClassifier(Segmenter):
    """A segmenter whose logits are a convolution of one map, the embedding; subclasses set up `classifier`."""

    classifies: ClassVar[bool] = True

    def classify(self, embedding: Float[Array, "b _ _ c"], size: tuple[int, int]) -> Float[Array, "b h w k"]:
        """Logits at `size` = (h, w) of an embedding, this network's or another's with as many channels.

        `network.apply(variables, prediction.embedding, size, method="classify")` is `prediction.logits`.
        """
        return resized(self.classifier(embedding), size)


def resized(scores: Float[Array, "b _ _ k"], size: tuple[int, int]) -> Float[Array, "b h w k"]:
    """Logits in float32 at `size` = (h, w), as they are where they have it."""
    scores = scores.astype(jnp.float32)
    return scores if scores.shape[1:3] == tuple(size) else resize_bilinear(scores, size)


def whole_image(encoder: ResNet) -> FieldOfView:
    """Of a network that looks at means of the whole image: global, aligned to the last stage's stride."""
    return FieldOfView(max(encoder.strides.values()), None)


class FCNSegmenter(PixelClassifier):
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
        embedding = self.relu(self.bn(self.conv(last), train))
        return Prediction(self.classify(embedding, x.shape[1:3]), None, features, features, embedding)


def build_fcn(options: FCN, num_classes: int, dtype: Any) -> FCNSegmenter:
    channels = options.channels or max(1, channels_of(options.encoder, options.width, options.stages) // 4)
    return FCNSegmenter(build_encoder(options, options.stages, dtype), channels, num_classes, jnp.dtype(dtype))
