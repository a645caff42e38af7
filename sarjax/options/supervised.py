"""Options of plain supervised segmentation."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from sarjax.options.base import NOT_NEGATIVE, Accepts, MethodOptions


@dataclasses.dataclass(frozen=True)
class Supervised(MethodOptions):
    """Cross-entropy, optionally with Dice.

    dice: weight of the Dice loss beside cross-entropy. auxiliary: weight of the network's auxiliary head.
    class_weights: "none", "histogram" (inverse square root of the training frequencies, mean 1), or "given" in
    `class_weight_values`. label_smoothing: as in cross-entropy.
    """

    NAME: ClassVar[str] = "supervised"
    ACCEPTED: ClassVar[Mapping[str, Accepts]] = {
        "dice": NOT_NEGATIVE,
        "auxiliary": NOT_NEGATIVE,
        "label_smoothing": ("a share from 0 to below 1", lambda v: 0 <= v < 1),
    }
    dice: float = 0.0
    auxiliary: float = 0.0
    class_weights: Literal["none", "histogram", "given"] = "none"
    class_weight_values: tuple[float, ...] = ()
    label_smoothing: float = 0.0
