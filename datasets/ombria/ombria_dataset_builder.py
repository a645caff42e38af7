"""The builder of OMBRIA; README.md beside it says where its rules come from."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sarjax_datasets import builder
from scipy import ndimage

from sarjax import raster
from sarjax.errors import UserError
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

SIDE = 256
DATES = ("before", "after")
SMALLEST_STRIPE = 64

SPEC = DatasetSpec(
    name="ombria",
    modalities=(
        ModalitySpec("sar", (BandSpec("VV", "stretched"),)),
        ModalitySpec(
            "optical",
            (BandSpec("swir", "reflectance"), BandSpec("nir", "reflectance"), BandSpec("green", "reflectance")),
        ),
    ),
    classes=(ClassSpec("dry", (222, 203, 164)), ClassSpec("flood", (33, 102, 222))),
    dates=2,
)


class Tile(NamedTuple):
    source: Path
    part: str
    number: str

    def path(self, sensor: int, kind: str) -> Path:
        folder = self.source / f"OmbriaS{sensor}" / self.part / kind.upper()
        return folder / f"S{sensor}_{kind}_{self.number}.png"


class Builder(builder.Builder):
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (what TFDS asks for)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Clone github.com/geodrak/OMBRIA; the source is its folder with OmbriaS1/ and OmbriaS2/."
    )

    @classmethod
    def spec_of(cls, config: str = "") -> DatasetSpec:
        return SPEC

    def plan(self, source: Path) -> dict[str, list[Tile]]:
        for sensor in (1, 2):
            if not (source / f"OmbriaS{sensor}").is_dir():
                raise UserError(
                    f"{source} has no folder OmbriaS{sensor}: the source of ombria is the folder that holds OmbriaS1 "
                    "and OmbriaS2."
                )
        published = _paired(source, "train")
        return {
            "train": [tile for tile in published if not in_validation(tile.number)],
            "val": [tile for tile in published if in_validation(tile.number)],
            "test": _paired(source, "test"),
        }

    def examples(self, job: Tile) -> Iterator[dict[str, Any]]:
        sar = np.stack([_image(job.path(1, date), 1) for date in DATES])
        optical = np.stack([_image(job.path(2, date), 3) for date in DATES])
        mask_path = job.path(1, "mask")
        mask = _image(mask_path, 1)[..., 0]
        other = np.setdiff1d(mask, (0, 255))
        if other.size:
            raise UserError(
                f"{mask_path} holds the value {other[0]}: masks of OMBRIA are 0 (dry) and 255 (flood) only."
            )
        yield builder.example(
            SPEC,
            int(job.number),
            f"{job.part}/{job.number}",
            {"sar": sar, "optical": optical},
            {"sar": np.stack([~stripes(image[..., 0]) for image in sar]), "optical": optical.any(-1)},
            (mask == 255).astype(np.uint8),
        )


def in_validation(number: str) -> bool:
    """Whether the training tile `number` ("0013") belongs to val: about one in six, whatever else is there."""
    return zlib.crc32(number.encode()) % 6 == 2


def stripes(image: np.ndarray) -> np.ndarray:
    """No-data pixels (h, w) bool of an S1 image (h, w) uint8: large regions of 255 that touch the border."""
    regions, count = ndimage.label(image == 255, np.ones((3, 3)))
    large = np.bincount(regions.ravel(), minlength=count + 1) >= SMALLEST_STRIPE
    touching = np.zeros(count + 1, bool)
    for edge in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        touching[edge] = True
    no_data = large & touching
    no_data[0] = False
    return no_data[regions]


def _paired(source: Path, part: str) -> list[Tile]:
    """The tiles of a published part, by number; UserError if a file of a tile is missing."""
    numbers: set[str] = set()
    for sensor in (1, 2):
        for kind in (*DATES, "mask"):
            folder = source / f"OmbriaS{sensor}" / part / kind.upper()
            if not folder.is_dir():
                raise UserError(f"{folder} is missing: it should hold S{sensor}_{kind}_NNNN.png.")
            found = (re.fullmatch(rf"S{sensor}_{kind}_(\d+)\.png", path.name) for path in folder.iterdir())
            numbers |= {match[1] for match in found if match}
    if not numbers:
        raise UserError(
            f"{source} holds no tile in {part}: files like OmbriaS1/{part}/BEFORE/S1_before_0001.png are expected."
        )
    tiles = [Tile(source, part, number) for number in sorted(numbers)]
    for tile in tiles:
        for sensor in (1, 2):
            for kind in (*DATES, "mask"):
                if not tile.path(sensor, kind).is_file():
                    raise UserError(
                        f"{tile.path(sensor, kind)} is missing while other images of tile {tile.number} are there: "
                        "every tile needs before, after and mask of both sensors."
                    )
    return tiles


def _image(path: Path, bands: int) -> np.ndarray:
    image = raster.read(path)
    if image.shape != (SIDE, SIDE, bands) or image.dtype != np.uint8:
        h, w, c = image.shape
        raise UserError(
            f"{path} is {w} x {h} with {c} bands of {image.dtype}, but {SIDE} x {SIDE} with {bands} of uint8 is "
            "expected."
        )
    return image
