"""FRD (Wang et al.): networks that compare two dates, and a small one that learns relations between them."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from sarjax.options.base import NOT_NEGATIVE, POSITIVE, Accepts, NetworkOptions
from sarjax.options.supervised import Supervised


@dataclasses.dataclass(frozen=True)
class Change(NetworkOptions):
    """One encoder for both dates, and a feature pyramid of the differences of their features.

    channels: of every map of the pyramid, before `width`. difference: "absolute", no matter which date came first, or
    "signed", the later minus the earlier, which tells what came from what went. Reads `inputs.by_date`.
    """

    NAME: ClassVar[str] = "change"
    DATES: ClassVar[int] = 2
    channels: int = 128
    difference: Literal["absolute", "signed"] = "absolute"


@dataclasses.dataclass(frozen=True)
class FCSiamDiff(NetworkOptions):
    """FC-Siam-diff (Daudt et al., ICIP 2018): a U-Net whose skips are absolute differences of the two dates' features.

    width: multiplies its 16 to 128 channels; it has no ResNet inside. Reads `inputs.by_date`.
    """

    NAME: ClassVar[str] = "fc_siam_diff"
    DATES: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class RelationalDistillation(Supervised):
    """Supervised change detection by a small network that also learns from a frozen large one.

    Weights of the parts: distances between the dates' features, by pixel and between the means of classes at each date
    (BFDD: bfdd_pixel, bfdd_category); the share of change and no change in a pixel's difference, by pixel and by the
    columns of all pixels (CCRD: ccrd_pixel, ccrd_cluster); logits: of plain logit distillation, at `temperature`.

    balanced: in bfdd_pixel every class counts alike, else every pixel. channels: which of the wider network's channels
    BFDD reads: "random" = as many as the narrower has, drawn anew in each step; or "all". sharpness: temperature of
    CCRD's shares. cluster_temperature: of the contrast of columns.
    """

    NAME: ClassVar[str] = "frd"
    ACCEPTED: ClassVar[Mapping[str, Accepts]] = {
        **Supervised.ACCEPTED,
        **dict.fromkeys(("bfdd_pixel", "bfdd_category", "ccrd_pixel", "ccrd_cluster", "logits"), NOT_NEGATIVE),
        **dict.fromkeys(("temperature", "sharpness", "cluster_temperature"), POSITIVE),
    }
    bfdd_pixel: float = 1.0
    bfdd_category: float = 1.0
    ccrd_pixel: float = 1.0
    ccrd_cluster: float = 1.0
    logits: float = 0.0
    temperature: float = 4.0
    balanced: bool = True
    channels: Literal["random", "all"] = "random"
    sharpness: float = 0.1
    cluster_temperature: float = 1.0
