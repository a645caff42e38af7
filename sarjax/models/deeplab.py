"""DeepLabv3 (Chen, Papandreou, Schroff, Adam, arXiv 1706.05587) in the configuration whose costs Cheng et al. print."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.models.layers import AdaptiveAvgPool, ConvNormReLU, conv, kaiming_fan_in, scaled
from sarjax.models.segmenters import PixelClassifier, Prediction, build_encoder, whole_image
from sarjax.options import DeepLabV3


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


class DeepLabV3Segmenter(PixelClassifier):
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
        embedding = self.aspp(features[max(features)], train)
        return Prediction(self.classify(embedding, x.shape[1:3]), None, features, features, embedding)


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
