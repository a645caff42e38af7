"""DLLR (Han et al.): two sensors that complement each other, and labels reassigned by optimal transport."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from sarjax.options.base import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_COUNT, SHARE, Accepts, NetworkOptions
from sarjax.options.supervised import Supervised


@dataclasses.dataclass(frozen=True)
class DLLR(NetworkOptions):
    """An encoder-decoder for each of SAR and optical images, an exchange guided by their difference, a fused head.

    channels, bins, alignment: of both decoders, as in `DHFA`.
    """

    NAME: ClassVar[str] = "dllr"
    channels: int = 128
    bins: tuple[int, ...] = (1, 2, 3, 6)
    alignment: Literal["flow", "none"] = "none"


@dataclasses.dataclass(frozen=True)
class LabelReassignment(Supervised):
    """Semi-supervised segmentation of SAR and optical images: every part has a switch.

    unlabelled: rows without labels per labelled one (0 = plain supervision; needs experiment.data.labelled below 1).
    dropout: share of rows in training in which one sensor is withheld from the fused head.

    Asymmetric masking of unlabelled rows: cell: side of a cell in pixels (0 = no masking). mask_optical, mask_sar:
    share of cells that each loses, together at most 1, so that every cell stays visible in one of them; rows from
    which a sensor is withheld, and pixels that one does not see, are not masked.
    complementary: weight of difference-guided complementary learning.

    cross: weight of cross pseudo-supervision between the sensors. consistency: weight of supervision by the fused
    head's pseudo-labels. ramp: share of the training in which the weights of unlabelled rows rise. threshold: of the
    largest probability, below which a pseudo-label does not count.

    Reassignment by optimal transport, by levels: prediction, prototype, region (the two on cells of 8 x 8); with none
    a pseudo-label is the most probable class. mass: of classes, "soft" = relaxed by `relaxation` (tau below 1), "hard"
    = exact, or "uniform" (exact and equal). cost: of a prediction, -log p with `epsilon` 1 or 1 - p ("linear") with a
    small one. prototype_epsilon: of the prototype level. iterations: of Sinkhorn. momentum: of prototypes and labelled
    frequencies. queue: batches over which mean predictions are kept.
    """

    NAME: ClassVar[str] = "dllr"
    ACCEPTED: ClassVar[Mapping[str, Accepts]] = {
        **Supervised.ACCEPTED,
        **dict.fromkeys(("unlabelled", "cell"), COUNT),
        **dict.fromkeys(("dropout", "mask_optical", "mask_sar", "threshold", "momentum"), SHARE),
        **dict.fromkeys(("complementary", "cross", "consistency", "ramp"), NOT_NEGATIVE),
        **dict.fromkeys(("epsilon", "prototype_epsilon"), POSITIVE),
        **dict.fromkeys(("iterations", "queue"), POSITIVE_COUNT),
        "relaxation": ("a share above 0 and up to 1", lambda v: 0 < v <= 1),
    }
    # With a threshold most terms would wait for a network that is sure.
    STEADY: ClassVar[Mapping[str, Any]] = {"cell": 0, "dropout": 0.0, "ramp": 0.0, "threshold": 0.0}
    unlabelled: int = 1
    dropout: float = 0.15
    cell: int = 32
    mask_optical: float = 0.5
    mask_sar: float = 0.25
    complementary: float = 0.5
    cross: float = 1.0
    consistency: float = 1.0
    ramp: float = 0.2
    threshold: float = 0.0
    prediction: bool = True
    prototype: bool = True
    region: bool = False
    mass: Literal["soft", "hard", "uniform"] = "soft"
    relaxation: float = 0.5
    cost: Literal["log", "linear"] = "log"
    epsilon: float = 1.0
    prototype_epsilon: float = 0.05
    iterations: int = 50
    momentum: float = 0.99
    queue: int = 64
