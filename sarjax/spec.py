"""What a data set holds (`DatasetSpec`) and what a method asks of it (`Stream`).

A spec travels beside the records as `spec.json`, the statistics of the training split as `stats.json`,
so that training from records needs neither the builder's code nor the original files.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

IGNORE_LABEL = 255

Radiometry = Literal["reflectance", "amplitude", "intensity", "db", "stretched"]
RADIOMETRIES: tuple[str, ...] = ("reflectance", "amplitude", "intensity", "db", "stretched")


@dataclasses.dataclass(frozen=True)
class BandSpec:
    """One band of one modality.

    `radiometry` says what a stored number means, and so which augmentation is physical:
    reflectance (optical, linear), amplitude and intensity (SAR, linear: multiplicative speckle),
    db (SAR, logarithmic: additive noise), stretched (each image scaled by itself: numbers are not
    comparable between images, so no physical noise model applies).
    """

    name: str
    radiometry: Radiometry

    def __post_init__(self):
        if self.radiometry not in RADIOMETRIES:
            raise ValueError(f"radiometry of band {self.name!r} is {self.radiometry!r}; one of {RADIOMETRIES}")


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to an image between its file and the records, and again when a map is made from a file.

    lee: Lee's speckle filter over `window` x `window` pixels of a linear image with `looks` looks.
    db: 10 log10 of an intensity or 20 log10 of an amplitude, as `quantity` says; 0 and below become no-data.
    Either gives float32.
    """

    name: Literal["lee", "db"]
    quantity: Literal["intensity", "amplitude"] = "intensity"
    window: int = 7
    looks: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModalitySpec:
    """A sensor: its bands in stored order, the dtype that they are stored in, and how they are read from files.

    no_data: a pixel whose bands all hold this value in the file saw nothing, if it lies in an 8-connected region of at
    least `smallest_gap` such pixels; so do NaN and what the file itself declares. transforms: applied in order.
    """

    name: str
    bands: tuple[BandSpec, ...]
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    no_data: float | None = None
    smallest_gap: int = 1
    transforms: tuple[Transform, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClassSpec:
    """One class: its name and its display colour (R, G, B, 0..255)."""

    name: str
    colour: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What a data set holds.

    modalities: sensors in order. dates: acquisitions per tile (t of (b, t, h, w, c)).
    classes: index = label value. excluded: names of classes that macro averages leave out.
    Label 255 is ignored everywhere.
    """

    name: str
    modalities: tuple[ModalitySpec, ...]
    classes: tuple[ClassSpec, ...]
    dates: int = 1
    excluded: tuple[str, ...] = ()

    def __post_init__(self):
        names = [c.name for c in self.classes]
        missing = [name for name in self.excluded if name not in names]
        if missing:
            raise ValueError(f"excluded classes {missing} of {self.name!r} are not among {names}")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.classes)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(c.colour for c in self.classes)

    @property
    def macro_classes(self) -> tuple[int, ...]:
        """Indices of the classes that macro averages run over."""
        return tuple(i for i, c in enumerate(self.classes) if c.name not in self.excluded)

    @property
    def modality_names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.modalities)

    def modality(self, name: str) -> ModalitySpec:
        """The modality called `name`; KeyError names those there are."""
        for m in self.modalities:
            if m.name == name:
                return m
        raise KeyError(f"data set {self.name!r} has no modality {name!r}, only {', '.join(self.modality_names)}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "DatasetSpec":
        d = json.loads(text)
        return cls(
            name=d["name"],
            modalities=tuple(
                ModalitySpec(
                    m["name"],
                    tuple(BandSpec(**b) for b in m["bands"]),
                    m["dtype"],
                    m.get("no_data"),
                    m.get("smallest_gap", 1),
                    tuple(Transform(**t) for t in m.get("transforms", ())),
                )
                for m in d["modalities"]
            ),
            classes=tuple(ClassSpec(c["name"], tuple(c["colour"])) for c in d["classes"]),
            dates=d["dates"],
            excluded=tuple(d["excluded"]),
        )


@dataclasses.dataclass(frozen=True)
class BandStatistics:
    """Mean and standard deviation per band of one modality, over valid training pixels of all dates, stored units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the training split (`stats.json`).

    bands: {modality: BandStatistics}. class_pixels: labelled training pixels per class (ignored ones left out).
    tiles: {split: number of tiles}. records: {file name: sha256} of the record shards of all splits.
    """

    bands: Mapping[str, BandStatistics]
    class_pixels: tuple[int, ...]
    tiles: Mapping[str, int]
    records: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Statistics":
        d: dict[str, Any] = json.loads(text)
        bands = {
            name: BandStatistics(**{k: tuple(v) if isinstance(v, list) else v for k, v in b.items()})
            for name, b in d["bands"].items()
        }
        return cls(bands, tuple(d["class_pixels"]), d["tiles"], d["records"])


class Stream(NamedTuple):
    """Rows of one kind in a batch: a method's batch is `{stream name: plain dict of arrays}`.

    kind: "labelled" draws from the labelled part of the training split; "unlabelled" from the rest, its `label`
    being 255 everywhere and the truth moved to `hidden_label`; "follow" takes for row r the partner of row r of
    stream `follows`, drawn uniformly from the row's own tile and those that `memory[table]` (n, k) lists for it.
    rows: rows of this stream in the global batch, as a share of `batch_size` (1 = batch_size rows).
    """

    kind: Literal["labelled", "unlabelled", "follow"]
    rows: float = 1.0
    follows: str = ""
    table: str = ""
