"""DeepLabv3 (Chen et al., arXiv 1706.05587) on ResNet-50."""

import dataclasses
from typing import ClassVar, Literal

from sarjax.options.base import NetworkOptions


@dataclasses.dataclass(frozen=True)
class DeepLabV3(NetworkOptions):
    """Dilated convolutions at several rates beside a pool of the whole image, on the encoder's last stage.

    rates: dilations of the 3x3 branches, for output stride 16; DeepLabv3 doubles them at 8. channels: of every branch
    and of their projection, before `width`.
    """

    NAME: ClassVar[str] = "deeplabv3"
    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    output_stride: Literal[8, 16, 32] = 16
    rates: tuple[int, ...] = (6, 12, 18)
    channels: int = 256
