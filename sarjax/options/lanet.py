"""LANet (Ding et al., TGRS 2021) on ResNet-18 as in Cheng et al., and the plain FCN head it is compared with."""

import dataclasses
from typing import ClassVar, Literal

from sarjax.options.base import NetworkOptions


@dataclasses.dataclass(frozen=True)
class FCN(NetworkOptions):
    """A 3x3 convolution, a classifier and bilinear upsampling on the last stage kept.

    stages: number of ResNet stages kept (4 = all). channels: of the head (0 = a quarter of the encoder's).
    """

    NAME: ClassVar[str] = "fcn"
    stages: Literal[1, 2, 3, 4] = 4
    channels: int = 0


@dataclasses.dataclass(frozen=True)
class LANet(NetworkOptions):
    """LANet-R18: patch attention on the first and third stage, attention embedding between them.

    low_window, high_window: patch sizes of the two patch attentions, in cells; 0 = one patch, the whole image, which
    makes it a squeeze-and-excitation (FCN+SE of Cheng et al. has both 0). reductions: low, high.
    residual: L' = L + L*A (Cheng et al.); False = L*A (the public LANet code). channels: of the high-level branch
    before `width`. stages: which stage the high-level branch reads.
    """

    NAME: ClassVar[str] = "lanet"
    stages: Literal[3, 4] = 3
    low_window: int = 8
    high_window: int = 2
    low_reduction: int = 8
    high_reduction: int = 16
    channels: int = 128
    residual: bool = True
