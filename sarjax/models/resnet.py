"""ResNet (He et al., CVPR 2016) in torchvision's layout, as an encoder."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.models.context import Extent
from sarjax.models.layers import BatchNorm, MaxPool, ReLU, conv, scaled

# encoder -> (block is a bottleneck, blocks of each stage)
ENCODERS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}
EXPANSION = 4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. torchvision knows no dilation here; ours dilates both."""

    channels: int
    stride: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b oh ow k"]:
        relu = ReLU(name="relu")
        y = conv(self.channels, 3, stride=self.stride, dilation=self.dilation, dtype=self.dtype, name="conv1")(x)
        y = relu(BatchNorm(dtype=self.dtype, name="bn1")(y, train))
        y = conv(self.channels, 3, dilation=self.dilation, dtype=self.dtype, name="conv2")(y)
        y = BatchNorm(dtype=self.dtype, name="bn2")(y, train)
        return relu(y + _shortcut(x, self.channels, self.stride, self.dtype, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is on the 3x3 (ResNet "v1.5")."""

    channels: int
    stride: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b oh ow k"]:
        relu = ReLU(name="relu")
        y = conv(self.channels, dtype=self.dtype, name="conv1")(x)
        y = relu(BatchNorm(dtype=self.dtype, name="bn1")(y, train))
        y = conv(self.channels, 3, stride=self.stride, dilation=self.dilation, dtype=self.dtype, name="conv2")(y)
        y = relu(BatchNorm(dtype=self.dtype, name="bn2")(y, train))
        y = conv(EXPANSION * self.channels, dtype=self.dtype, name="conv3")(y)
        y = BatchNorm(dtype=self.dtype, name="bn3")(y, train)
        return relu(y + _shortcut(x, EXPANSION * self.channels, self.stride, self.dtype, train))


def _shortcut(x: Array, channels: int, stride: int, dtype: Any, train: bool) -> Array:
    """The identity, or a strided 1x1 convolution where the shape changes; called inside a block's `__call__`."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = conv(channels, stride=stride, dtype=dtype, name="downsample_0")(x)
    return BatchNorm(dtype=dtype, name="downsample_1")(x, train)


class ResNet(nn.Module):
    """The convolutional part of a ResNet, cut after `stages`.

    encoder: key of `ENCODERS`. width: multiplies all channel counts. output_stride: 8, 16 or 32; a stage that would
    exceed it is dilated instead of strided, by torchvision's rule: its first block has the dilation of the stage
    before. stages: number of stages kept. dtype: compute dtype.

    Submodules are called as in torchvision with "." written "_", which `sarjax.models.torchvision` relies on.
    """

    encoder: str = "resnet18"
    width: float = 1.0
    output_stride: int = 32
    stages: int = 4
    dtype: Any = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Stride of each stage by name, in order."""
        return {f"c{i}": min(2 ** (i + 1), self.output_stride) for i in range(1, self.stages + 1)}

    @property
    def extents(self) -> dict[str, Extent]:
        """What a cell of each stage reads of the image, by the stage's name; follows `__call__` line by line."""
        bottleneck, blocks = ENCODERS[self.encoder]
        extent = Extent().convolution(7, stride=2).convolution(3, stride=2)
        extents, dilation = {}, 1
        for stage in range(1, self.stages + 1):
            stride, first_dilation = (1 if stage == 1 else 2), dilation
            if extent.stride * stride > self.output_stride:
                dilation, stride = dilation * stride, 1
            for i in range(blocks[stage - 1]):
                extent = extent.convolution(3, stride if i == 0 else 1, first_dilation if i == 0 else dilation)
                extent = extent if bottleneck else extent.convolution(3, 1, first_dilation if i == 0 else dilation)
            extents[f"c{stage}"] = extent
        return extents

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> dict[str, Float[Array, "b _ _ _"]]:
        """Features by name: "stem" (stride 2, before the max-pool), and "c1" to "c4", one per stage kept."""
        bottleneck, blocks = ENCODERS[self.encoder]
        block = Bottleneck if bottleneck else BasicBlock
        x = x.astype(self.dtype)
        x = conv(scaled(64, self.width), 7, stride=2, dtype=self.dtype, name="conv1")(x)
        x = ReLU(name="relu")(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        features = {"stem": x}
        x = MaxPool(name="maxpool")(x)
        reached, dilation = 4, 1
        for stage in range(1, self.stages + 1):
            stride, first_dilation = (1 if stage == 1 else 2), dilation
            if reached * stride > self.output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            for i in range(blocks[stage - 1]):
                x = block(
                    channels=scaled(64 * 2 ** (stage - 1), self.width),
                    stride=stride if i == 0 else 1,
                    dilation=first_dilation if i == 0 else dilation,
                    dtype=self.dtype,
                    name=f"layer{stage}_{i}",
                )(x, train)
            features[f"c{stage}"] = x
        return features


def channels_of(encoder: str, width: float, stage: int) -> int:
    """Channels of the features of a stage (1..4)."""
    return scaled(64 * 2 ** (stage - 1), width) * (EXPANSION if ENCODERS[encoder][0] else 1)
