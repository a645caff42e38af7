"""What a scene is: the raster files that are read together, as said on a command line, and as one image by window."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sarjax.data.imagery import check_image, read_image
from sarjax.data.statistics import Moments
from sarjax.errors import UserError
from sarjax.georeference import NOWHERE, Georeference, difference, same_place
from sarjax.raster import READABLE, Reader, Window, open_raster
from sarjax.scenes.outputs import is_of_a_map
from sarjax.spec import DatasetSpec

STRIDE = 1024  # side of the blocks in which statistics are taken
OTHER_NAMES = {"optical": "image"}  # of subfolders, where there is none of the sensor's name

Say = Callable[[str], None]


class Reads(NamedTuple):
    """What a network reads of a data set: sensors in order, and which of the data set's dates, ascending."""

    spec: DatasetSpec
    modalities: tuple[str, ...]
    dates: tuple[int, ...]

    @property
    def usage(self) -> str:
        """How a scene for it is written."""
        if len(self.modalities) * len(self.dates) == 1:
            return "a raster file, or a folder of them"
        plus = "+".join(["FILE"] * len(self.dates))
        named = ",".join(f"{name}={plus}" for name in self.modalities)
        folders = [_subfolder(name, k) for name in self.modalities for k in range(len(self.dates))]
        return f"{named}, or a folder with subfolders {', '.join(folders)}"


class Scene(NamedTuple):
    """A name, and per sensor a file per date of the data set; None for a date that the network does not read.

    strict: a sensor's files must say the same about where they lie; else what only one of them says is believed.
    """

    name: str
    files: Mapping[str, tuple[Path | None, ...]]
    strict: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for paths in self.files.values() for path in paths if path is not None)


def parse_scenes(texts: Sequence[str], reads: Reads, say: Say = lambda line: None) -> list[Scene]:
    """The scenes that `texts` name; opens no raster.

    A text is a raster file where one sensor at one date is read; `sar=A.tif,optical=B.tif` for several sensors, with
    the dates joined by "+"; or a folder: of rasters, or of subfolders named by sensor ("sar", and "sar_2" for its
    second date) that hold files of the same names. Folders are searched to the bottom, and a scene that lies deeper is
    called by its path with "_" for "/"; hidden files and maps of ours are left aside. Dates are those of the
    data set, in order; where a network reads only some of them, those alone will do. `say` gets a line where rasters
    of a folder are left aside that could have been meant.

    Raises:
      UserError: a text that is none of these, or two scenes of one name.
    """
    return _distinct([scene for text in texts for scene in _parse(str(text), reads, say)])


def pair_scenes(before: str, after: str, reads: Reads, say: Say = lambda line: None) -> list[Scene]:
    """The scenes of two dates that two texts name, each as for a network that reads one date; opens no raster.

    Two files, or two lists `sar=A.tif,optical=B.tif`, make one scene: called A_B, or A where both are called so. Two
    folders make one of each name, which has to be in both. The files of a sensor have to lie on one grid, by what each
    of them says itself: a shift between the dates would show as change.

    Raises:
      UserError: a network that does not read two dates; texts that name no scenes, or not the same.
    """
    if len(reads.dates) != 2:
        raise UserError(
            f"--t1 and --t2 are for a run that reads two dates, but this one reads {len(reads.dates)}: {reads.usage} "
            "is accepted."
        )
    folders = [text for text in (before, after) if Path(text).is_dir()]
    if len(folders) == 1:
        other = after if folders[0] == before else before
        raise UserError(f"{folders[0]} is a folder and {other} is none: two files, or two folders, are accepted.")
    alone = reads._replace(spec=dataclasses.replace(reads.spec, dates=1), dates=(0,))
    first, second = ({scene.name: scene for scene in _distinct(_parse(text, alone, say))} for text in (before, after))
    if not folders:
        (a,), (b,) = first, second
        name = a if a == b else f"{a}_{b}"
        first, second = {name: first[a]}, {name: second[b]}
    odd = sorted(first.keys() ^ second.keys())
    if odd:
        here, there = (before, after) if odd[0] in first else (after, before)
        raise UserError(f"{here} holds {odd[0]!r} and {there} does not: rasters of the same names are needed.")

    def dated(name: str, sensor: str) -> tuple[Path | None, ...]:
        found = dict(zip(reads.dates, (first[name].files[sensor][0], second[name].files[sensor][0]), strict=True))
        return tuple(found.get(date) for date in range(reads.spec.dates))

    return [Scene(name, {sensor: dated(name, sensor) for sensor in reads.modalities}, True) for name in first]


def _distinct(scenes: list[Scene]) -> list[Scene]:
    """`scenes`; UserError where two have one name."""
    seen: dict[str, Scene] = {}
    for scene in scenes:
        if scene.name in seen:
            raise UserError(
                f"{seen[scene.name].paths[0]} and {scene.paths[0]} would both become {scene.name}.tif: scenes of "
                "different names, or two calls with two --out, are accepted."
            )
        seen[scene.name] = scene
    return scenes


def _parse(text: str, reads: Reads, say: Say) -> list[Scene]:
    if Path(text).is_dir():
        return _folder(Path(text), reads, say)
    if Path(text).exists() or "=" not in text:
        named = {reads.modalities[0]: [text] if Path(text).exists() else text.split("+")}
    else:
        named = {}
        for part in text.split(","):
            name, equals, files = part.partition("=")
            if not equals or not files or name in named:
                raise UserError(f"scene {text!r} cannot be understood: {reads.usage} is accepted.")
            named[name] = files.split("+")
    for name in named:
        if name not in reads.modalities:
            raise UserError(
                f"scene {text!r} gives {name!r}, but this network reads {' and '.join(reads.modalities)}: "
                f"{reads.usage} is accepted."
            )
    missing = [name for name in reads.modalities if name not in named]
    if missing:
        raise UserError(f"scene {text!r} lacks {' and '.join(missing)}: {reads.usage} is accepted.")
    files = {name: _dated(text, [Path(f) for f in named[name]], reads) for name in reads.modalities}
    scene = Scene("", files)
    return [scene._replace(name=scene.paths[0].stem)]


def _dated(text: str, paths: Sequence[Path], reads: Reads) -> tuple[Path | None, ...]:
    """A file per date of the data set, of the files of all dates or of those that are read."""
    given = range(reads.spec.dates) if len(paths) == reads.spec.dates else reads.dates
    if len(paths) != len(given):
        counts = sorted({len(reads.dates), reads.spec.dates})
        raise UserError(
            f"the number of dates in scene {text!r} is {len(paths)}, but should be {' or '.join(map(str, counts))}: "
            f"{reads.usage} is accepted."
        )
    by_date = dict(zip(given, paths, strict=True))
    return tuple(by_date[t] if t in reads.dates else None for t in range(reads.spec.dates))


def _subfolder(modality: str, number: int) -> str:
    return modality if number == 0 else f"{modality}_{number + 1}"


def _place(folder: Path, modality: str, number: int) -> Path:
    """The subfolder of a sensor at a date, which need not exist."""
    named, other = folder / _subfolder(modality, number), OTHER_NAMES.get(modality)
    return folder / _subfolder(other, number) if other and not named.is_dir() else named


def _folder(folder: Path, reads: Reads, say: Say) -> list[Scene]:
    first = reads.modalities[0]
    if not _place(folder, first, 0).is_dir():
        if len(reads.modalities) * len(reads.dates) > 1:
            raise UserError(f"{folder} has no subfolder {first}: {reads.usage} is accepted.")
        files = _rasters(folder, say)
        return [Scene(name, {first: _dated(str(folder), [path], reads)}) for name, path in files.items()]
    loose = sum(_is_raster(path) for path in folder.iterdir())
    if loose:
        say(f"{folder}: {loose} raster(s) beside the subfolder {_place(folder, first, 0).name} are left aside")
    found: dict[str, list[dict[str, Path]]] = {}
    for name in reads.modalities:
        folders = [_place(folder, name, k) for k in range(reads.spec.dates)]
        found[name] = [_rasters(path, say) for path in folders if path.is_dir()]
        if not found[name]:
            raise UserError(f"{folder} has no subfolder {name}: {reads.usage} is accepted.")
    stems = list(found[first][0])
    for name, dates in found.items():
        for number, files in enumerate(dates):
            odd = sorted(set(files) ^ set(stems))
            if odd:
                raise UserError(
                    f"{folder} holds {odd[0]!r} in only one of the subfolders {_place(folder, first, 0).name} and "
                    f"{_place(folder, name, number).name}: files of the same names are needed."
                )
    return [
        Scene(stem, {name: _dated(str(folder), [d[stem] for d in dates], reads) for name, dates in found.items()})
        for stem in stems
    ]


def _rasters(folder: Path, say: Say) -> dict[str, Path]:
    """{scene: path} of the rasters in a folder and below, sorted."""
    found: dict[str, Path] = {}
    maps = 0
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts) or not _is_raster(path):
            continue
        if is_of_a_map(path):
            maps += 1
            continue
        name = inner.with_suffix("").as_posix().replace("/", "_")
        if name in found:
            if found[name].with_suffix("") == path.with_suffix(""):
                raise UserError(f"{found[name]} and {path} differ by their ending only: one of them is accepted.")
            raise UserError(f"{found[name]} and {path} would both become {name}.tif: other names are needed.")
        found[name] = path
    if maps:
        say(f"{folder}: {maps} file(s) of maps that were made before are left aside")
    if not found:
        raise UserError(f"{folder} holds no raster ({', '.join(READABLE)}).")
    return found


def _is_raster(path: Path) -> bool:
    return path.suffix.lower() in READABLE and not path.name.startswith(".") and path.is_file()


class SceneReader:
    """An open scene: its size, where it lies, and windows of it as a network reads them. For one thread."""

    def __init__(self, reads: Reads, readers: Mapping[str, Sequence[Reader | None]]):
        self.reads, self._readers = reads, readers
        opened = [r for dates in readers.values() for r in dates if r is not None]
        self.height, self.width = opened[0].info.height, opened[0].info.width
        for reader in opened:
            if (reader.info.height, reader.info.width) != (self.height, self.width):
                raise UserError(
                    f"{reader.path} is {reader.info.width} x {reader.info.height} pixels, but {opened[0].path} is "
                    f"{self.width} x {self.height}: rasters of a scene must be of one size."
                )
        placed = [r for r in opened if r.info.georeference != NOWHERE]
        self.georeference: Georeference = placed[0].info.georeference if placed else NOWHERE
        for reader in placed[1:]:
            if not same_place(self.georeference, reader.info.georeference, self.height, self.width):
                raise UserError(
                    f"{reader.path} does not lie where {placed[0].path} does (CRS or transform differ): rasters of a "
                    "scene must be on one grid."
                )

    def read(self, window: Window) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """({sensor: (t, h, w, c), sensor_valid: (t, h, w) uint8}, (h, w) bool: seen by any sensor at any date).

        The window may reach beyond the scene, or lie, below and to the right: there is no-data there, as for dates that
        are not read.
        """
        row, column, height, width = window
        inside = Window(row, column, min(height, self.height - row), min(width, self.width - column))
        outside = min(inside.height, inside.width) <= 0
        batch: dict[str, np.ndarray] = {}
        for name, dates in self._readers.items():
            modality = self.reads.spec.modality(name)
            image = np.zeros((len(dates), height, width, len(modality.bands)), modality.dtype)
            valid = np.zeros((len(dates), height, width), np.uint8)
            for t, reader in enumerate(dates):
                if reader is not None and not outside:
                    part = t, slice(inside.height), slice(inside.width)
                    image[part], valid[part] = read_image(reader, modality, inside)
            batch |= {name: image, f"{name}_valid": valid}
        return batch, np.any([batch[f"{name}_valid"].any(0) for name in self._readers], axis=0)


@contextlib.contextmanager
def open_scene(scene: Scene, reads: Reads) -> Iterator[SceneReader]:
    """The scene's rasters, opened and compared; UserError where one is not what the network reads, or they differ."""
    with contextlib.ExitStack() as stack:
        readers: dict[str, list[Reader | None]] = {}
        for name, paths in scene.files.items():
            readers[name] = [None if path is None else stack.enter_context(open_raster(path)) for path in paths]
            for path, reader in zip(paths, readers[name], strict=True):
                if reader is not None:
                    check_image(path, reader.info, reads.spec.modality(name))
            if scene.strict:
                _check_grid([reader for reader in readers[name] if reader is not None])
        yield SceneReader(reads, readers)


def _check_grid(readers: Sequence[Reader]) -> None:
    """UserError that names what differs between the files of a sensor that are to be compared pixel by pixel."""
    first = readers[0]
    for reader in readers[1:]:
        a, b = first.info, reader.info
        if (a.height, a.width) != (b.height, b.width):
            odd = f"size {a.width} x {a.height} and {b.width} x {b.height}"
        else:
            odd = difference(a.georeference, b.georeference, a.height, a.width)
        if odd:
            raise UserError(
                f"{first.path} and {reader.path} are not on one grid ({odd}): the two dates are compared pixel by "
                "pixel, so resample one onto the other."
            )


def scene_statistics(scene: SceneReader, progress: Callable[[int, int], None] | None = None) -> dict[str, np.ndarray]:
    """{sensor_mean, sensor_std: (t, c) float32} over all valid pixels of the scene, in one pass over it by blocks."""
    spec, moments = scene.reads.spec, {}
    for name in scene.reads.modalities:
        moments[name] = [Moments(len(spec.modality(name).bands)) for _ in range(spec.dates)]
    corners = [(y, x) for y in range(0, scene.height, STRIDE) for x in range(0, scene.width, STRIDE)]
    for done, (y, x) in enumerate(corners):
        batch, _ = scene.read(Window(y, x, min(STRIDE, scene.height - y), min(STRIDE, scene.width - x)))
        for name, dates in moments.items():
            for t, m in enumerate(dates):
                m.add(batch[name][t][batch[f"{name}_valid"][t] > 0])
        if progress:
            progress(done + 1, len(corners))
    out = {}
    for name, dates in moments.items():
        found = [m.result() for m in dates]
        out[f"{name}_mean"] = np.array([s.mean for s in found], np.float32)
        out[f"{name}_std"] = np.array([s.std for s in found], np.float32)
    return out
