"""What options of networks and of methods have in common."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from sarjax.errors import UserError

# What a value should be, in words, and whether it is.
Accepts = tuple[str, Callable[[Any], bool]]
COUNT: Accepts = "a whole number from 0", lambda v: v >= 0
POSITIVE_COUNT: Accepts = "a whole number from 1", lambda v: v >= 1
POSITIVE: Accepts = "a number above 0", lambda v: 0 < v < math.inf
NOT_NEGATIVE: Accepts = "a number from 0", lambda v: 0 <= v < math.inf
SHARE: Accepts = "a share from 0 to 1", lambda v: 0 <= v <= 1


class Named:
    """Base of options: `registry()` lists the subclasses by their `NAME`.

    ACCEPTED: of fields whose type does not say it all, what they should be; a subclass adds to its parent's.
    """

    NAME: ClassVar[str] = ""
    ACCEPTED: ClassVar[Mapping[str, Accepts]] = {}

    @classmethod
    def registry(cls) -> dict[str, Any]:
        kinds: dict[str, Any] = {cls.NAME: cls} if cls.NAME else {}
        for sub in cls.__subclasses__():
            kinds |= sub.registry()
        return kinds


@dataclasses.dataclass(frozen=True)
class NetworkOptions(Named):
    """What every network has.

    encoder: a ResNet of torchvision's layout. width: multiplies its channel counts. output_stride: 8, 16 or 32,
    later stages dilated instead of strided. weights: path of torchvision-layout .safetensors ("" = random).
    DATES: images that the network compares, whose channels follow one another (`Inputs.by_date`); 1 = it sees all
    channels as one image.
    """

    DATES: ClassVar[int] = 1
    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    width: float = 1.0
    output_stride: Literal[8, 16, 32] = 32
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class MethodOptions(Named):
    """Base of a method's options.

    STEADY: values of fields with which every step is the same from the first on, for who compares steps: nothing is
    drawn, no weight rises.
    """

    STEADY: ClassVar[Mapping[str, Any]] = {}


def check(options: Any, where: str) -> None:
    """UserError that names the first field of `options`, or of options inside them, that makes no sense."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{where}.{field.name}")
        elif field.name in options.ACCEPTED:
            accepted, accepts = options.ACCEPTED[field.name]
            if not accepts(value):
                raise UserError(f"{where}.{field.name} is {value!r}, but should be {accepted}.")
