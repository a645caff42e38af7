"""The builder of OMBRIA; README.md beside it says where its rules come from."""

import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sarjax_datasets import builder

from sarjax.data.layout import NO_OPTIONS, Layout, Options, Problem, Scene, missing, without
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

SIDE = 256
DATES = ("before", "after")
SENSORS = {"sar": 1, "optical": 2}

SPEC = DatasetSpec(
    name="ombria",
    modalities=(
        ModalitySpec("sar", (BandSpec("VV", "stretched"),), no_data=255, smallest_gap=64),
        ModalitySpec(
            "optical",
            (BandSpec("swir", "reflectance"), BandSpec("nir", "reflectance"), BandSpec("green", "reflectance")),
            no_data=0,
        ),
    ),
    classes=(ClassSpec("dry", (222, 203, 164)), ClassSpec("flood", (33, 102, 222))),
    dates=2,
)


class Builder(builder.Builder):
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (what TFDS asks for)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Clone github.com/geodrak/OMBRIA; the source is its folder with OmbriaS1/ and OmbriaS2/."
    )

    @classmethod
    def spec_of(cls, config: str = "") -> DatasetSpec:
        return SPEC

    @classmethod
    def declared(cls, config: str = "") -> tuple[DatasetSpec, int]:
        builder.known_config(cls, config)
        return SPEC, SIDE

    @classmethod
    def layout(cls, source: Path, config: str = "", options: Options = NO_OPTIONS) -> Layout:
        builder.known_config(cls, config)
        scenes: list[Scene] = []
        problems: list[Problem] = []
        known: set[str] = set()
        for sensor in (1, 2):
            if not (source / f"OmbriaS{sensor}").is_dir():
                text = (
                    f"{source} has no folder OmbriaS{sensor}: the source of ombria is the folder that holds OmbriaS1 "
                    "and OmbriaS2."
                )
                problems.append(Problem("fatal", "missing", str(source), text))
        for part in ("train", "test") if not problems else ():
            found, wrong, names = _paired(source, part)
            scenes += found
            problems += wrong
            known |= names
        chosen = without(scenes, options.exclude, known)
        splits = {scene.name: _split(*scene.name.split("/")) for scene in chosen}
        problems += _in_both(chosen)
        return Layout(SPEC, {0: 0, 255: 1}, chosen, splits, tuple(problems), tile=SIDE)


def in_validation(number: str) -> bool:
    """Whether the training tile `number` ("0013") belongs to val: about one in six, whatever else is there."""
    return zlib.crc32(number.encode()) % 6 == 2


def _split(part: str, number: str) -> str:
    return "val" if part == "train" and in_validation(number) else part


def _in_both(scenes: Iterable[Scene]) -> Iterator[Problem]:
    """Numbers, which are the ids of records, that both published parts have."""
    first: dict[int | None, str] = {}
    for scene in scenes:
        other = first.setdefault(scene.tile_id, scene.name)
        if other != scene.name:
            text = f"{other} and {scene.name} have one number: a tile is in one split."
            yield Problem("fatal", "split", scene.name, text)


def _path(source: Path, part: str, number: str, sensor: int, kind: str) -> Path:
    return source / f"OmbriaS{sensor}" / part / kind.upper() / f"S{sensor}_{kind}_{number}.png"


def _paired(source: Path, part: str) -> tuple[list[Scene], list[Problem], set[str]]:
    """The complete tiles of a published part, by number, what is missing of others, and the names of all.

    Both sensors have the same masks: those of S1 are read.
    """
    numbers: set[str] = set()
    problems: list[Problem] = []
    for sensor, kind in [(1, "mask"), *((s, date) for s in SENSORS.values() for date in DATES)]:
        folder = _path(source, part, "", sensor, kind).parent
        if not folder.is_dir():
            text = f"{folder} is missing: it should hold S{sensor}_{kind}_NNNN.png."
            problems.append(Problem("fatal", "missing", str(folder), text))
            continue
        found = (re.fullmatch(rf"S{sensor}_{kind}_(\d+)\.png", path.name) for path in folder.iterdir())
        numbers |= {match[1] for match in found if match}
    if problems:
        return [], problems, set()
    if not numbers:
        text = f"{source} holds no tile in {part}: files like OmbriaS1/{part}/BEFORE/S1_before_0001.png are expected."
        return [], [Problem("fatal", "missing", str(source), text)], set()
    scenes = []
    for number in sorted(numbers):
        images = {m: tuple(_path(source, part, number, s, date) for date in DATES) for m, s in SENSORS.items()}
        scene = Scene(f"{part}/{number}", images, _path(source, part, number, 1, "mask"), int(number))
        gone = [path for path in scene.files if not path.is_file()]
        problems += [missing(scene.name, path) for path in gone]
        if not gone:
            scenes.append(scene)
    return scenes, problems, {f"{part}/{number}" for number in numbers}
