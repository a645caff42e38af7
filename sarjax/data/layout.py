"""How a data set lies on disk: which files make a scene, what label values mean, how scenes are cut and split.

A builder's folder under `datasets/` says it as a `Layout`, plain values; records are built from it
(`datasets/builder.py`) and the doctor checks it (`sarjax/data/doctor.py`), so both see the same files in the same way.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sarjax import raster
from sarjax.data.imagery import check_image
from sarjax.errors import UserError, unknown
from sarjax.georeference import same_place
from sarjax.raster import Info, Window
from sarjax.spec import DatasetSpec


class Problem(NamedTuple):
    """Something wrong with the files of a data set.

    severity: a build stops at "fatal"; it goes on with a "warning", leaving out what is incomplete.
    kind: "missing", "unreadable", "size", "bands", "dtype", "georeference", "labels", "no-data", "absent class",
    "alignment", "duplicate", "split", "description". where: the file or scene. text: one sentence that names it.
    """

    severity: Literal["fatal", "warning"]
    kind: str
    where: str
    text: str


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user asks of a layout.

    exclude: names of scenes to leave out, with or without the files' ending. description: the TOML file that says what
    a folder of one's own holds (`paired_folder`; None = the folder's `dataset.toml`).
    """

    exclude: tuple[str, ...] = ()
    description: Path | None = None


NO_OPTIONS = Options()


class Scene(NamedTuple):
    """The files of one scene. images: {modality: one file per date}. name: unique; its tiles' names begin with it.

    label: None = the data set has none: all of its pixels are 255 (ignore).
    tile_id: the scene is one tile, of this id and the scene's own name (None: tiles are cut from it and numbered).
    """

    name: str
    images: Mapping[str, tuple[Path, ...]]
    label: Path | None
    tile_id: int | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        labels = () if self.label is None else (self.label,)
        return (*(path for paths in self.images.values() for path in paths), *labels)


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
    {scene name: split}; what is in no split is not built. problems: what listing the files has found already (no file
    has been opened for it).
    tile: side in pixels. cover: the last row and column of tiles are shifted back so that every pixel is in one
    (else right and bottom remainders are left out). random: tiles, not scenes, are drawn for the splits, 60/20/20
    (`drawn_split`), and `splits` is not used: neighbours leak. notice: a line for the user about what a build leaves
    out ("" = nothing). threshold: where labels are grey levels, the value from which on a pixel is of another class
    than 0; that no label of a split reaches it is an error (`off_scale`).
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
    threshold: int | None = None


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
    sizes = [found[:2] for found in infos.values()]
    first = max(infos, key=lambda path: sizes.count(infos[path][:2]))  # the odd one out is the wrong one
    size = infos[first][:2]
    for path, found in infos.items():
        if found[:2] != size:
            text = f"{path} is {found.width} x {found.height} pixels, but {first} is {size[1]} x {size[0]}: "
            problems.append(Problem("fatal", "size", str(path), f"{text}they must agree."))
    if scene.tile_id is not None and size != (tile, tile):
        text = f"{first} is {size[1]} x {size[0]} pixels, but {tile} x {tile} is expected."
        problems.append(Problem("fatal", "size", str(first), text))
    elif min(size) < tile:
        text = f"{first} is {size[1]} x {size[0]} pixels, smaller than a tile of {tile}."
        problems.append(Problem("fatal", "size", str(first), text))
    for m in spec.modalities:
        for path in (p for p in scene.images[m.name] if p in infos):
            try:
                check_image(path, infos[path], m)
            except UserError as e:
                kind = "bands" if infos[path].bands != len(m.bands) else "dtype"
                problems.append(Problem("fatal", kind, str(path), str(e)))
    label = infos.get(scene.label) if scene.label else None
    if label and (label.bands != 1 or np.dtype(label.dtype).kind not in "ui"):
        text = f"{scene.label} has {label.bands} bands of {label.dtype}: labels are one band of whole numbers."
        problems.append(Problem("fatal", "bands", str(scene.label), text))
    return size, problems + _place(infos)


def _place(infos: Mapping[Path, Info]) -> list[Problem]:
    """Where files of a scene lie in different places, by `same_place`.

    Files are held against the first that has a transform, and the first that has a reference system.
    """
    placed = [
        next((p for p, i in infos.items() if getattr(i.georeference, k) is not None), None)
        for k in ("transform", "crs")
    ]
    problems = []
    for path, i in infos.items():
        here = i.georeference
        for first in (p for p in placed if p is not None):
            there = infos[first].georeference
            if same_place(there, here, i.height, i.width):
                continue
            if None not in (here.crs, there.crs) and here.crs != there.crs:
                text = f"{path} is in {here.crs}, but {first} is in {there.crs}: reproject one onto the other."
            else:
                pixels = _pixels_apart(there.transform, here.transform, i.height, i.width)
                text = f"{path} lies {pixels:.1f} pixels away from {first}: resample one onto the other."
            problems.append(Problem("fatal", "georeference", str(path), text))
            break
    return problems


def _pixels_apart(a: Any, b: Any, height: int, width: int) -> float:
    """How far corners of height x width under two transforms lie apart, along either axis, in pixels of the first."""
    first, second = (np.array(t, np.float64).reshape(-1, 3)[:2] for t in (a, b))
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], np.float64)
    pixel = np.maximum(np.abs(first[:, :2]).max(1), np.finfo(np.float64).tiny)
    return float((np.abs(corners @ (first - second).T) / pixel).max())


def missing(scene: str, path: Path, more: str = "") -> Problem:
    """The warning that `scene` is left out because its file `path` is not there."""
    return Problem("warning", "missing", str(path), f"{path} is missing: scene {scene} is left out{more}.")


def listed(names: Iterable[object], most: int = 10) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def without(scenes: Sequence[Scene], exclude: Iterable[str], known: Iterable[str] = ()) -> tuple[Scene, ...]:
    """`scenes` but for those that `exclude` names, with or without a file's ending.

    known: names that may be excluded though they are not there. UserError, with the nearest, for any other name.
    """
    names = {scene.name for scene in scenes} | set(known)
    unwanted = set()
    for name in exclude:
        found = name if name in names else without_ending(name)
        if found not in names:
            raise unknown("scene to exclude", name, names)
        unwanted.add(found)
    return tuple(scene for scene in scenes if scene.name not in unwanted)


def without_ending(name: str) -> str:
    """A file's name without the ending of a raster, if it has one."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in raster.READABLE else name


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line; UserError if unreadable. A line that is empty or begins with # has none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "no text in UTF-8"
        raise UserError(f"{path} cannot be read ({reason}): a text file with one name a line is expected.") from e
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def split_by_order(names: Iterable[str], validation: bool = True) -> dict[str, str]:
    """{name: split}: in every ten of the sorted names 7 train, 1 val and 2 test, the first three being one of each.

    Without `validation`: 8 train and 2 test. Fewer than three names: all train.
    """
    turns = ["train", "val", "test", "train", "train", "train", "train", "test", "train", "train"]
    names = sorted(names)
    if len(names) < 3:
        return dict.fromkeys(names, "train")
    return {
        name: "train" if turns[i % 10] == "val" and not validation else turns[i % 10] for i, name in enumerate(names)
    }


def drawn_split(tile_name: str) -> str:
    """The split of a tile where tiles are drawn (`Layout.random`): by its name alone, whichever others there are."""
    share = int.from_bytes(hashlib.sha256(tile_name.encode()).digest()[:8]) / 2**64
    return "train" if share < 0.6 else "val" if share < 0.8 else "test"


def tile_origins(length: int, tile: int, cover: bool) -> list[int]:
    """First pixels of the tiles along an axis of `length` >= `tile` pixels; see `Layout.cover`."""
    origins = list(range(0, length - tile + 1, tile))
    if cover and origins[-1] + tile < length:
        origins.append(length - tile)
    return origins


def off_scale(layout: Layout, highest: Callable[[Scene], int]) -> list[Problem]:
    """A fatal problem for each split whose labels hold more than 0 and never `layout.threshold`: 0 and 1, it may be.

    Else all of them would become one class, in silence. A label of 0 alone is sound: nothing changed there. highest:
    the largest value in a scene's label file; it is asked for until a split is known to be sound.
    """
    problems: list[Problem] = []
    splits: dict[str, list[Scene]] = {}
    for scene in layout.scenes if layout.threshold is not None else ():
        split = "all" if layout.random else layout.splits.get(scene.name)
        if split is not None and scene.label is not None:
            splits.setdefault(split, []).append(scene)
    for split, scenes in splits.items():
        low: list[tuple[Path | None, int]] = []
        for scene in scenes:
            value = highest(scene)
            if value >= layout.threshold:
                break
            if value > 0:
                low.append((scene.label, value))
        else:
            for path, value in low[:1]:
                below, above = (layout.spec.class_names[layout.labels[v]] for v in (0, layout.threshold))
                text = (
                    f"{path} holds no label above {value}, and no label in {split} reaches {layout.threshold}, from "
                    f"which on a pixel is {above}: 0 = {below} and 255 = {above} are accepted."
                )
                problems.append(Problem("fatal", "labels", str(path), text))
    return problems


def in_words(values: Iterable[int]) -> str:
    """Whole numbers in order, runs of three or more by their ends: "0, 10, 128 to 255"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def read_labels(reader: raster.Reader, labels: Mapping[int, int], window: Window) -> np.ndarray:
    """(h, w) uint8 class indices, 255 = ignore; UserError for a value that `labels` does not have."""
    stored = reader.read(window)[..., 0]
    if stored.dtype.itemsize > 2 or stored.dtype.kind != "u":
        values, stored = np.unique(stored, return_inverse=True)
    else:
        values = np.arange(np.iinfo(stored.dtype).max + 1)
    found = np.flatnonzero(np.bincount(stored.ravel(), minlength=len(values)))
    unknown = [int(values[i]) for i in found if int(values[i]) not in labels]
    if unknown:
        raise UserError(f"{reader.path} holds the label {unknown[0]}: labels are {in_words(labels)}.")
    return np.array([labels.get(int(v), 0) for v in values], np.uint8)[stored.reshape(window[2:])]
