"""DHFA-Net (Gao et al.): a pyramid of features that are aligned as they are joined."""

import dataclasses
from typing import ClassVar, Literal

from sarjax.options.base import NetworkOptions


@dataclasses.dataclass(frozen=True)
class DHFA(NetworkOptions):
    """Feature pyramid whose coarse maps are sampled at learnt offsets (HFAM), the same for teacher and student.

    channels: of every map of the pyramid, before `width`; 256 is usual with resnet50. bins: sides of the grids of
    means beside the coarsest features. alignment: "none" = bilinear upsampling, a plain pyramid. corner_aligned: the
    grid of SFNet, which maps corners on corners and has zeros outside of the map. fuse: maps of the other modality are
    hallucinated from each level, and the head reads both.
    """

    NAME: ClassVar[str] = "dhfa"
    channels: int = 128
    bins: tuple[int, ...] = (1, 2, 3, 6)
    alignment: Literal["flow", "none"] = "flow"
    corner_aligned: bool = False
    fuse: bool = False
