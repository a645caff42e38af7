"""How a data set lies on disk: which files make a scene, what label values mean, how scenes are cut and split.

A builder's folder under `datasets/` says it as a `Layout`, plain values; records are built from it
(`datasets/builder.py`) and the doctor checks it (`sarjax/data/doctor.py`), so both see the same files in the same way.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sarjax import raster
from sarjax.data.imagery import check_image
from sarjax.errors import UserError
from sarjax.raster import Info, Window
from sarjax.spec import DatasetSpec


class Problem(NamedTuple):
    """Something wrong with the files of a data set.

    severity: a build stops at "fatal"; it goes on with a "warning", leaving out what is incomplete.
    kind: "missing", "unreadable", "size", "bands", "dtype", "georeference", "labels", "no-data", "absent class",
    "alignment", "split", "description". where: the file or scene. text: one sentence that names it.
    """

    severity: Literal["fatal", "warning"]
    kind: str
    where: str
    text: str


class Scene(NamedTuple):
    """The files of one scene. images: {modality: one file per date}. name: unique; its tiles' names begin with it."""

    name: str
    images: Mapping[str, tuple[Path, ...]]
    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (*(path for paths in self.images.values() for path in paths), self.label)


class WaterCheck(NamedTuple):
    """NDWI = (green - nir) / (green + nir) is higher on water than elsewhere; if it is not, labels are shifted.

    green, nir: band indices of `modality`. water: class index.
    """

    modality: str
    green: int
    nir: int
    water: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A data set as it lies on disk.

    labels: {value in the label files: class index, or 255 = ignore}. scenes: the complete ones, by name. splits:
    {scene name: split}. problems: what listing the files has found already (no file has been opened for it).
    tile: side in pixels. cover: the last row and column of tiles are shifted back so that every pixel is in one
    (else right and bottom remainders are left out). random: tiles, not scenes, are drawn for the splits, 60/20/20:
    neighbours leak. notice: a line for the user about what a build leaves out ("" = nothing).
    """

    spec: DatasetSpec
    labels: Mapping[int, int]
    scenes: tuple[Scene, ...]
    splits: Mapping[str, str]
    problems: tuple[Problem, ...] = ()
    tile: int = 256
    cover: bool = False
    random: bool = False
    water: WaterCheck | None = None
    notice: str = ""


def headers(scene: Scene) -> tuple[dict[Path, Info], list[Problem]]:
    """The headers of a scene's files, and a fatal "unreadable" for each file that has none to read."""
    infos, problems = {}, []
    for path in scene.files:
        try:
            infos[path] = raster.info(path)
        except UserError as e:
            problems.append(Problem("fatal", "unreadable", str(path), str(e)))
    return infos, problems


def check_scene(scene: Scene, spec: DatasetSpec, tile: int) -> tuple[tuple[int, int], list[Problem]]:
    """((height, width), problems) of a scene by its headers: they must agree in size, bands, dtype and place.

    What cannot be read is left out of the comparison; where nothing can be, the size is (0, 0).
    """
    infos, problems = headers(scene)
    if not infos:
        return (0, 0), problems
    first = next(iter(infos))
    size = infos[first][:2]
    for path, found in infos.items():
        if found[:2] != size:
            text = f"{path} is {found.width} x {found.height} pixels, but {first} is {size[1]} x {size[0]}: "
            problems.append(Problem("fatal", "size", str(path), f"{text}they must agree."))
    if min(size) < tile:
        text = f"{first} is {size[1]} x {size[0]} pixels, smaller than a tile of {tile}."
        problems.append(Problem("fatal", "size", str(first), text))
    for m in spec.modalities:
        for path in (p for p in scene.images[m.name] if p in infos):
            try:
                check_image(path, infos[path], m)
            except UserError as e:
                kind = "bands" if infos[path].bands != len(m.bands) else "dtype"
                problems.append(Problem("fatal", kind, str(path), str(e)))
    label = infos.get(scene.label)
    if label and (label.bands != 1 or np.dtype(label.dtype).kind not in "ui"):
        text = f"{scene.label} has {label.bands} bands of {label.dtype}: labels are one band of whole numbers."
        problems.append(Problem("fatal", "bands", str(scene.label), text))
    return size, problems + _place(infos)


def _place(infos: Mapping[Path, Info]) -> list[Problem]:
    """Warnings where georeferenced files of a scene lie in different places (half a pixel or more)."""
    placed = [(p, i) for p, i in infos.items() if i.georeference.transform is not None]
    problems = []
    for path, i in placed[1:]:
        first, reference = placed[0]
        a, b = reference.georeference, i.georeference
        pixel = max(abs(a.transform.a) + abs(a.transform.b), abs(a.transform.d) + abs(a.transform.e))
        corners = [(0, 0), (i.width, 0), (0, i.height), (i.width, i.height)]
        off = max(max(abs(u - v) for u, v in zip(a.transform * c, b.transform * c, strict=True)) for c in corners)
        if a.crs != b.crs:
            text = f"{path} is in {b.crs}, but {first} is in {a.crs}: reproject one onto the other."
            problems.append(Problem("fatal", "georeference", str(path), text))
        elif off >= 0.5 * pixel:
            text = f"{path} lies {off / pixel:.1f} pixels away from {first}: resample one onto the other."
            problems.append(Problem("fatal", "georeference", str(path), text))
    return problems


def tile_origins(length: int, tile: int, cover: bool) -> list[int]:
    """First pixels of the tiles along an axis of `length` >= `tile` pixels; see `Layout.cover`."""
    origins = list(range(0, length - tile + 1, tile))
    if cover and origins[-1] + tile < length:
        origins.append(length - tile)
    return origins


def read_labels(reader: raster.Reader, labels: Mapping[int, int], window: Window) -> np.ndarray:
    """(h, w) uint8 class indices, 255 = ignore; UserError for a value that `labels` does not have."""
    stored = reader.read(window)[..., 0]
    values, inverse = np.unique(stored, return_inverse=True)
    unknown = [int(v) for v in values if int(v) not in labels]
    if unknown:
        known = ", ".join(map(str, sorted(labels)))
        raise UserError(f"{reader.path} holds the label {unknown[0]}: labels are {known}.")
    return np.array([labels[int(v)] for v in values], np.uint8)[inverse.reshape(stored.shape)]
