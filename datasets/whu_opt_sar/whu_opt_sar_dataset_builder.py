"""The builder of WHU-OPT-SAR and of made-up scenes in its layout; README.md says where the rules come from."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from sarjax_datasets import builder
from scipy import ndimage

from sarjax import raster
from sarjax.errors import UserError
from sarjax.spec import IGNORE_LABEL, BandSpec, ClassSpec, DatasetSpec, ModalitySpec

SMALLEST_GAP = 64
LABELS = np.full(256, -1, np.int16)
LABELS[range(0, 80, 10)] = (IGNORE_LABEL, *range(7))

SPEC = DatasetSpec(
    name="whu_opt_sar",
    modalities=(
        ModalitySpec("sar", (BandSpec("backscatter", "amplitude"),)),
        ModalitySpec("optical", tuple(BandSpec(name, "reflectance") for name in ("blue", "green", "red", "nir"))),
    ),
    classes=(
        ClassSpec("farmland", (204, 102, 0)),
        ClassSpec("city", (255, 0, 0)),
        ClassSpec("village", (255, 255, 0)),
        ClassSpec("water", (0, 0, 255)),
        ClassSpec("forest", (85, 167, 0)),
        ClassSpec("road", (0, 255, 255)),
        ClassSpec("others", (153, 102, 153)),
    ),
    excluded=("others",),
)


class Scene(NamedTuple):
    """Files of a scene, a triple (optical, sar, label) per date, its size, and the id of its first tile."""

    files: tuple[tuple[Path, Path, Path], ...]
    height: int
    width: int
    first: int


class Builder(builder.Builder):
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (what TFDS asks for)
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="scene", description="One date, split by scene."),
        tfds.core.BuilderConfig(name="dates2", description="Two dates of made-up scenes, split by scene."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Download by hand (see README.md); the source holds optical/, sar/ and lbl/."

    @classmethod
    def spec_of(cls, config: str = "") -> DatasetSpec:
        return dataclasses.replace(SPEC, dates=2) if config == "dates2" else SPEC

    def plan(self, source: Path) -> dict[str, list[Scene]]:
        folders = [_folders(source, date) for date in range(1, self.spec.dates + 1)]
        names = sorted(p.name for p in folders[0][0].iterdir() if p.suffix.lower() in (".tif", ".tiff"))
        if not names:
            raise UserError(f"{folders[0][0]} holds no scene: files like NH49E001013.tif are expected.")
        where = split_of_scenes(names)
        plan: dict[str, list[Scene]] = {split: [] for split in ("train", "val", "test")}
        first = 0
        for name in names:
            files = tuple(tuple(folder / name for folder in date) for date in folders)
            height, width = self._size(files)
            plan[where[name]].append(Scene(files, height, width, first))
            first += (height // self.tile) * (width // self.tile)
        return plan

    def notice(self, source: Path) -> str:
        if self.spec.dates > 1 or not any((source / f"{kind}_2").is_dir() for kind in ("optical", "image", "sar")):
            return ""
        return f"{source} holds a second date, which this build leaves out: --config dates2 reads both."

    def examples(self, job: Scene) -> Iterator[dict[str, Any]]:
        side, tile_id, stem = self.tile, job.first, job.files[0][0].stem
        for row in range(0, job.height - side + 1, side):
            # A row of tiles at a time: the files are stored in strips of the full width.
            window = raster.Window(row, 0, side, job.width)
            optical, sar = (np.stack([_read(date[k], window) for date in job.files]) for k in (0, 1))
            label = _labels(job.files[-1][2], window)
            for column in range(0, job.width - side + 1, side):
                part = slice(column, column + side)
                images = {"optical": optical[:, :, part], "sar": sar[:, :, part]}
                valid = {
                    "optical": images["optical"].any(-1),
                    "sar": np.stack([~gaps(image[..., 0]) for image in images["sar"]]),
                }
                name = f"{stem}/r{row:05d}c{column:05d}"
                yield builder.example(self.spec, tile_id, name, images, valid, label[:, part])
                tile_id += 1

    def _size(self, files: tuple[tuple[Path, Path, Path], ...]) -> tuple[int, int]:
        """(height, width) that all files of a scene share; UserError where one is missing or differs."""
        size = raster.size(files[0][0])[:2]
        for path, bands in ((path, bands) for date in files for path, bands in zip(date, (4, 1, 1), strict=True)):
            if not path.is_file():
                raise UserError(f"{path} is missing while {files[0][0]} is there: every scene needs all of its files.")
            h, w, c = raster.size(path)
            if (h, w) != size:
                raise UserError(
                    f"{path} is {w} x {h} pixels, but {files[0][0]} is {size[1]} x {size[0]}: they must agree."
                )
            if c != bands:
                raise UserError(f"{path} has {c} bands, but {bands} are expected.")
        if min(size) < self.tile:
            raise UserError(f"{files[0][0]} is {size[1]} x {size[0]} pixels, smaller than a tile of {self.tile}.")
        return size


def split_of_scenes(names: list[str]) -> dict[str, str]:
    """{scene: split}: the official split where all names are official; by the order of names where none is."""
    official = _official()
    foreign = [name for name in names if name not in official]
    if not foreign:
        return {name: official[name] for name in names}
    if len(foreign) < len(names):
        raise UserError(
            f"{foreign[0]} is no scene of WHU-OPT-SAR while {next(n for n in names if n in official)} is one: keep the "
            "published scenes and others in folders of their own."
        )
    if len(names) < 3:
        raise UserError(f"{len(names)} scene(s) cannot be split into train, val and test: at least 3 are needed.")
    turns = ("train", "val", "test", "train", "train", "train", "train", "test", "train", "train")
    return {name: turns[i % 10] for i, name in enumerate(sorted(names))}


def gaps(image: np.ndarray) -> np.ndarray:
    """No-data pixels (h, w) bool of an amplitude image (h, w): regions of 0 that are too large to be dark echoes."""
    regions, count = ndimage.label(image == 0, np.ones((3, 3)))
    large = np.bincount(regions.ravel(), minlength=count + 1) >= SMALLEST_GAP
    large[0] = False
    return large[regions]


def _official() -> dict[str, str]:
    train, test = (
        sorted(Path(__file__).with_name(f"scenes_{part}.txt").read_text(encoding="utf-8").split())
        for part in ("train", "test")
    )
    validation = train[7::8]
    return dict.fromkeys(train, "train") | dict.fromkeys(validation, "val") | dict.fromkeys(test, "test")


def _folders(source: Path, date: int) -> tuple[Path, Path, Path]:
    """The folders (optical, sar, label) of a date; UserError if one is missing."""
    end = f"_{date}" if date > 1 else ""
    optical = source / f"image{end}" if (source / f"image{end}").is_dir() else source / f"optical{end}"
    folders = optical, source / f"sar{end}", source / f"lbl{end}"
    for folder in folders:
        if not folder.is_dir():
            more = " (two dates come from `sarjax data synthesize --dates 2`)" if date > 1 else ""
            raise UserError(f"{folder} is missing: the source holds optical{end}/, sar{end}/ and lbl{end}/{more}.")
    return folders


def _read(path: Path, window: raster.Window) -> np.ndarray:
    image = raster.read(path, window)
    if image.dtype != np.uint8:
        raise UserError(f"{path} holds {image.dtype}, but uint8 is expected.")
    return image


def _labels(path: Path, window: raster.Window) -> np.ndarray:
    stored = _read(path, window)[..., 0]
    labels = LABELS[stored]
    if (labels < 0).any():
        raise UserError(f"{path} holds the label {stored[labels < 0][0]}: labels are 0, 10, 20, 30, 40, 50, 60 and 70.")
    return labels.astype(np.uint8)
