"""DeepLabv3 (Chen, Papandreou, Schroff, Adam, arXiv 1706.05587) in the configuration whose costs Cheng et al. print."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.models.layers import AdaptiveAvgPool, BatchNorm, ReLU, conv, kaiming_fan_in, scaled
from sarjax.models.resampling import resize_bilinear
from sarjax.models.segmenters import Prediction, Segmenter, build_encoder, whole_image
from sarjax.options import DeepLabV3


class ConvNormReLU(nn.Module):
    """relu bn conv(x), without bias; the size stays."""

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


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [1x1, a 3x3 per rate, the mean of the image], projected to `channels`.

    Each part is a convolution with batch-norm and ReLU. The norm of the mean has one value per image: in training a
    batch of one leaves nothing of it but the norm's bias.
    """

    channels: int
    rates: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w k"]:
        def part(name: str, **kernel: int) -> ConvNormReLU:
            return ConvNormReLU(self.channels, **kernel, dtype=self.dtype, name=name)

        parts = [part("point")(x, train)]
        for i, rate in enumerate(self.rates):
            parts.append(part(f"rate_{i}", kernel=3, dilation=rate)(x, train))
        mean = part("image")(AdaptiveAvgPool(1, name="pool")(x), train)
        parts.append(jnp.broadcast_to(mean, parts[0].shape))
        return part("project")(jnp.concatenate(parts, -1), train)


class DeepLabV3Segmenter(Segmenter):
    """Encoder, `ASPP`, 1x1 classifier, bilinear upsampling.

    torchvision's network of this name has another 3x3 convolution before the classifier and a dropout of 0.5 after
    the projection; the first does not fit Table 2 of Cheng et al., the second is left out.
    """

    channels: int
    rates: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32

    def setup(self):
        self.aspp = ASPP(self.channels, self.rates, dtype=self.dtype)
        self.classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=self.dtype)

    @property
    def context(self) -> FieldOfView:
        return whole_image(self.encoder)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        features = self.encode(x, train)
        scores = self.classifier(self.aspp(features[max(features)], train))
        return Prediction(resize_bilinear(scores.astype(jnp.float32), x.shape[1:3]), None, features)


def build_deeplab(options: DeepLabV3, num_classes: int, dtype: Any) -> DeepLabV3Segmenter:
    if not options.rates or min(options.rates) < 1:
        raise UserError(f"rates are {list(options.rates)}, but should be one or more whole numbers from 1.")
    return DeepLabV3Segmenter(
        encoder=build_encoder(options, 4, dtype),
        channels=scaled(options.channels, options.width),
        rates=tuple(options.rates),
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
    )
