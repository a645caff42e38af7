"""What options of networks and of methods have in common."""

import dataclasses
from typing import Any, ClassVar, Literal


class Named:
    """Base of options: `registry()` lists the subclasses by their `NAME`."""

    NAME: ClassVar[str] = ""

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
    """

    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"
    width: float = 1.0
    output_stride: Literal[8, 16, 32] = 32
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class MethodOptions(Named):
    """Base of a method's options."""
