"""PSPNet (Zhao et al., CVPR 2017) on ResNet-50, in the layout whose costs Cheng et al. print."""

import dataclasses
from typing import ClassVar, Literal

from sarjax.options.base import NetworkOptions


@dataclasses.dataclass(frozen=True)
class PSPNet(NetworkOptions):
    """A pyramid of means of the encoder's last stage, and learnt upsampling.

    bins: sides of the pyramid's grids. channels: of the bottleneck that joins them, and upsampling: of each stage that
    doubles the size, both before `width`. auxiliary: also predict from the stage before the last (Zhao et al. weigh
    it with 0.4: `method.auxiliary`).
    """

    NAME: ClassVar[str] = "pspnet"
    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    output_stride: Literal[8, 16, 32] = 8
    bins: tuple[int, ...] = (1, 2, 3, 6)
    channels: int = 1024
    upsampling: tuple[int, ...] = (256, 64, 64)
    auxiliary: bool = False
