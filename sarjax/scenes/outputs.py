"""The files of maps in a folder: whose they are, what they were made from, and a place where new ones are made.

OUT/ <scene>.tif  <scene>_probabilities.tif  <scene>.png (a look at it)  <scene>.json (its record, which comes last)
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sarjax import raster
from sarjax.errors import UserError
from sarjax.files import lock

if TYPE_CHECKING:
    from sarjax.scenes.inputs import Scene

MADE_BY = "sarjax predict"
TAG = "SARJAX_MAP"  # in the rasters, so that an interrupted call knows them again
WORK = ".sarjax-predict"  # in OUT, while maps are made
PROBABILITIES = "_probabilities"


class Outputs(NamedTuple):
    """The files of one scene's map, in the order in which they appear."""

    labels: Path
    probabilities: Path
    look: Path
    record: Path


def read_record(path: Path) -> dict[str, Any] | None:
    """A map's record, or None where there is none of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("made_by") == MADE_BY else None


def is_of_a_map(path: Path) -> bool:
    """Whether a picture belongs to a map that is there, by its name and the map's record."""
    if path.suffix not in (".tif", ".png"):
        return False
    names = {path.stem, path.stem.removesuffix(PROBABILITIES)}
    return any(read_record(path.with_name(f"{name}.json")) is not None for name in names)


class Decision(NamedTuple):
    """done: the record of a map that is what is asked for, else None. probabilities: whether they are to be made."""

    done: dict[str, Any] | None
    probabilities: bool


def outputs_of(out: Path, name: str) -> Outputs:
    return Outputs(*(out / f"{name}{end}" for end in (".tif", f"{PROBABILITIES}.tif", ".png", ".json")))


def decide(files: Outputs, about: Mapping[str, Any], probabilities: bool, overwrite: bool) -> Decision:
    """Whether a map is left alone or made again.

    about: what a map is made from and by; its "inputs" are dicts with the files' paths, sizes and times. A map that is
    made again has the probabilities that are asked for, and those that it had.

    Raises:
      UserError: a map made from other files or with other settings, where `overwrite` does not ask for it again.
    """
    record = read_record(files.record)
    if record is None:
        return Decision(None, probabilities)
    had = bool(record.get("probabilities")) and files.probabilities.is_file()
    wanted = probabilities or had
    if overwrite:
        return Decision(None, wanted)
    odd = _difference(record, about)
    if odd:
        raise UserError(
            f"{files.labels} was made {odd}: --overwrite makes it again, and another --out keeps it as it is."
        )
    same = record.get("inputs") == about["inputs"] and files.labels.is_file() and files.look.is_file()
    return Decision(record if same and (had or not probabilities) else None, wanted)


def _difference(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The first thing in which a map's record differs from what is asked for, "" for none; sizes and times aside."""
    for key, value in about.items():
        before = record.get(key)
        if key == "inputs":
            before, value = (_paths(inputs) for inputs in (before or (), value))
            if before != value:
                return f"from {', '.join(before) or 'nothing'}, not from {', '.join(value)}"
        elif before != value and key == "weights":
            return f"with other weights of {about['run']} under the name {about['checkpoint']}"
        elif before != value and key == "experiment":
            return f"by another experiment in {about['run']}"
        elif before != value:
            return f"with {key} {before}, not {value}"
    return ""


def _paths(inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{i.get('sensor')}={i.get('file')}" + (f" (date {i['date'] + 1})" if i.get("date") else "") for i in inputs
    ]


# --- Files that are there already


def check_places(scenes: "Sequence[Scene]", outputs: Sequence[Outputs], probabilities: bool, overwrite: bool) -> None:
    """UserError where a file would be written over that is an input, another scene's, or not ours."""
    inputs = {_identity(path) for scene in scenes for path in scene.paths}
    taken: dict[Path, str] = {}
    for scene, files in zip(scenes, outputs, strict=True):
        for path in files:
            if path in taken:
                raise UserError(f"{path} would be written for scenes {taken[path]} and {scene.name}: rename one.")
            taken[path] = scene.name
            if path.exists() and _identity(path) in inputs:
                raise UserError(f"{path} is an input and would be written over: another --out is needed.")
        record = read_record(files.record)
        wanted = probabilities or bool(record and record.get("probabilities"))
        _check_neighbours(scene.name, files, wanted)
        there = [path for path in files if path.exists() and (wanted or path != files.probabilities)]
        odd = [] if overwrite else _foreign(files, there, record)
        if odd:
            raise UserError(f"{odd[0]} was not made by sarjax predict: another --out, or --overwrite, is accepted.")


def _identity(path: Path) -> tuple[int, int]:
    at = os.stat(path)
    return at.st_dev, at.st_ino


def _check_neighbours(name: str, files: Outputs, probabilities: bool) -> None:
    """UserError where one scene's probabilities have the name of another scene's map, from calls before this one."""
    neighbour = f"{name}{PROBABILITIES}"
    if probabilities and read_record(files.record.with_name(f"{neighbour}.json")):
        raise UserError(f"{files.probabilities} is the map of scene {neighbour}: another --out is needed.")
    owner = name.removesuffix(PROBABILITIES)
    if owner not in (name, "") and files.labels.exists():
        record = read_record(files.record.with_name(f"{owner}.json"))
        if record and record.get("probabilities"):
            raise UserError(f"{files.labels} holds the probabilities of scene {owner}: another --out is needed.")


def _foreign(files: Outputs, there: Sequence[Path], record: Mapping[str, Any] | None) -> list[Path]:
    """Those of `there` that are no map's of ours, nor of one that was cut off before its record was written."""
    rasters = [path for path in there if path in (files.labels, files.probabilities)]
    if record:
        unknown = () if record.get("probabilities") else (files.probabilities,)
        return [path for path in there if path in unknown and not _is_tagged(path)]
    if files.record.exists() or not rasters or not all(map(_is_tagged, rasters)):
        return list(there)
    return []


def _is_tagged(path: Path) -> bool:
    try:
        with raster.open_raster(path) as f:
            return TAG in f.tags()
    except UserError:
        return False


# --- New files


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """An empty folder in `out`, which is made, gone at the end; what killed calls left is removed.

    One process at a time has it: UserError for any other, and for an `out` that cannot be written to. On file systems
    without locks every process has one of its own, and what killed calls left stays.
    """
    folder = out / WORK
    try:
        handle, alone = _hold(folder)
    except OSError as e:
        raise UserError(
            f"cannot write to {out}: {e.strerror or e}; --out takes a folder that may be written to."
        ) from e
    try:
        if alone:
            for left in folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            yield place
        finally:
            shutil.rmtree(folder if alone else place, ignore_errors=True)
    finally:
        os.close(handle)


def _hold(folder: Path) -> tuple[int, bool]:
    """A handle that keeps the lock of `folder` as long as it is open, and whether there is a lock at all."""
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the call before has just removed the folder
            continue
        try:
            if not lock(handle, f"another call is making maps in {folder.parent}: wait for it, or use another --out."):
                return handle, False
            # The call before may have removed the file after it was opened here: then its lock says nothing.
            if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle, True
        except UserError:
            os.close(handle)
            raise
        except FileNotFoundError:
            pass
        os.close(handle)


def publish(made: Outputs, files: Outputs) -> None:
    """Moves the files of a new map to their places, its record last: without it, a map is made again."""
    try:
        known = read_record(files.record) is not None
        files.record.unlink(missing_ok=True)
        theirs = read_record(files.probabilities.with_suffix(".json")) is not None  # of a scene that is called so
        if not (known or theirs or made.probabilities.exists()) and _is_tagged(files.probabilities):
            files.probabilities.unlink()  # of a map that was cut off
        for new, old in zip(made, files, strict=True):
            if new.exists():
                os.replace(new, old)
    except OSError as e:
        raise UserError(
            f"cannot write to {files.record.parent}: {e.strerror or e}; a folder that may be written to is needed."
        ) from e
