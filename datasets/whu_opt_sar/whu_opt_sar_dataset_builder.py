"""The builder of WHU-OPT-SAR and of made-up scenes in its layout; README.md says where the rules come from."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from sarjax_datasets import builder

from sarjax.data.layout import (
    NO_OPTIONS,
    Layout,
    Options,
    Problem,
    Scene,
    WaterCheck,
    listed,
    missing,
    split_by_order,
    without,
    without_ending,
)
from sarjax.spec import IGNORE_LABEL, BandSpec, ClassSpec, DatasetSpec, ModalitySpec

LABELS = {0: IGNORE_LABEL} | {10 * (i + 1): i for i in range(7)}

SPEC = DatasetSpec(
    name="whu_opt_sar",
    modalities=(
        # Single dark pixels of 0 are real.
        ModalitySpec("sar", (BandSpec("backscatter", "amplitude"),), no_data=0, smallest_gap=64),
        ModalitySpec(
            "optical", tuple(BandSpec(name, "reflectance") for name in ("blue", "green", "red", "nir")), no_data=0
        ),
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
WATER = WaterCheck("optical", green=1, nir=3, water=3)


class Cut(NamedTuple):
    """How a configuration cuts and splits scenes. validation: some training scenes are set apart as val."""

    description: str
    dates: int = 1
    tile: int = 256
    cover: bool = False
    validation: bool = True
    random: bool = False


CUTS = {
    "scene": Cut("Tiles of 256, split by scene: 70 train, 10 val, 20 test."),
    "scene_official": Cut("Tiles of 256, the published split by scene: 80 train, 20 test, no val.", validation=False),
    "random_tile": Cut(
        "Tiles of 256 drawn at random, 60/20/20, to compare with work that does so: neighbours of test tiles are "
        "trained on, so scores are too high.",
        random=True,
    ),
    "scene_512": Cut("Tiles of 512 that cover all of a scene, split by scene: 70/10/20.", tile=512, cover=True),
    "scene_official_512": Cut(
        "Tiles of 512 that cover all of a scene, the published split: 80/20.", tile=512, cover=True, validation=False
    ),
    "dates2": Cut("Two dates of made-up scenes, tiles of 256, split by scene.", dates=2),
}


class Builder(builder.Builder):
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (what TFDS asks for)
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=cut.description) for name, cut in CUTS.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Download by hand (see README.md); the source holds optical/, sar/ and lbl/."

    @classmethod
    def spec_of(cls, config: str = "") -> DatasetSpec:
        return dataclasses.replace(SPEC, dates=CUTS[builder.known_config(cls, config)].dates)

    @classmethod
    def declared(cls, config: str = "") -> tuple[DatasetSpec, int]:
        return cls.spec_of(config), CUTS[builder.known_config(cls, config)].tile

    @classmethod
    def layout(cls, source: Path, config: str = "", options: Options = NO_OPTIONS) -> Layout:
        cut = CUTS[builder.known_config(cls, config)]
        found, problems, known = _scenes(source, cut.dates)
        scenes = without(found, options.exclude, known | {without_ending(name) for name in _official()})
        if cut.random:
            splits = {}
        else:
            splits, wrong = split_of_scenes([scene.name for scene in scenes], cut.validation)
            problems += wrong
        return Layout(
            dataclasses.replace(SPEC, dates=cut.dates),
            LABELS,
            scenes,
            splits,
            tuple(problems),
            cut.tile,
            cut.cover,
            cut.random,
            WATER,
            _notice(source, cut),
        )


def split_of_scenes(names: list[str], validation: bool = True) -> tuple[dict[str, str], list[Problem]]:
    """({scene: split}, problems): the published split where all names are published; by their order where none is.

    validation: every 8th of the sorted published training scenes is in val; of other scenes one in ten.
    """
    published = {without_ending(name): split for name, split in _official().items()}
    if not validation:
        published = {name: "train" if split == "val" else split for name, split in published.items()}
    foreign = [name for name in names if name not in published]
    if not foreign:
        return {name: published[name] for name in names}, []
    if len(foreign) < len(names):
        text = (
            f"{foreign[0]} is no scene of WHU-OPT-SAR while {next(n for n in names if n in published)} is one: keep "
            "the published scenes and others in folders of their own."
        )
        return {}, [Problem("fatal", "split", foreign[0], text)]
    if len(names) < 3:
        text = f"{len(names)} scene(s) cannot be split into train, val and test: at least 3 are needed."
        return {}, [Problem("fatal", "split", names[0], text)]
    return split_by_order(names, validation), []


def _official() -> dict[str, str]:
    """{file name: split} of the published scenes."""
    train, test = (
        sorted(Path(__file__).with_name(f"scenes_{part}.txt").read_text(encoding="utf-8").split())
        for part in ("train", "test")
    )
    validation = train[7::8]
    return dict.fromkeys(train, "train") | dict.fromkeys(validation, "val") | dict.fromkeys(test, "test")


def _scenes(source: Path, dates: int) -> tuple[list[Scene], list[Problem], set[str]]:
    """The complete scenes by name; what is missing of others or not there at all; the names of all that are there."""
    folders = [_folders(source, date) for date in range(1, dates + 1)]
    problems = [_no_folder(folder, date) for date, group in enumerate(folders, 1) for folder in group]
    problems = [problem for problem in problems if problem]
    if problems:
        return [], problems, set()
    names = {path.name for group in folders for folder in group for path in folder.iterdir() if _is_scene(path)}
    scenes = []
    for name in sorted(names):
        images = {"sar": tuple(sar / name for _, sar, _ in folders)}
        images |= {"optical": tuple(optical / name for optical, _, _ in folders)}
        # The label is the last date's land cover.
        labels = [lbl / name for _, _, lbl in folders]
        scene = Scene(without_ending(name), images, labels[-1])
        gone = [path for path in (*scene.files, *labels[:-1]) if not path.is_file()]
        problems += [missing(scene.name, path) for path in gone]
        if not gone:
            scenes.append(scene)
    if not scenes:
        text = f"{folders[0][0]} holds no scene{' of which all files are there' if names else ''}"
        text += ": files like NH49E001013.tif, of one name in all folders, are expected."
        problems.insert(0, Problem("fatal", "missing", str(source), text))
    absent = [name for name in sorted(_official()) if name not in names]
    if absent and names & set(_official()):
        text = f"{source} lacks {len(absent)} of the 100 published scenes: {listed(map(without_ending, absent))}."
        problems.append(Problem("warning", "missing", str(source), text))
    return scenes, problems, {without_ending(name) for name in names}


def _is_scene(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff") and not path.name.startswith(".")


def _folders(source: Path, date: int) -> tuple[Path, Path, Path]:
    """The folders (optical, sar, label) of a date; the release of 2022 calls the first `image`."""
    end = f"_{date}" if date > 1 else ""
    optical = source / f"image{end}" if (source / f"image{end}").is_dir() else source / f"optical{end}"
    return optical, source / f"sar{end}", source / f"lbl{end}"


def _no_folder(folder: Path, date: int) -> Problem | None:
    if folder.is_dir():
        return None
    end = f"_{date}" if date > 1 else ""
    more = " (two dates come from `sarjax data synthesize --dates 2`)" if date > 1 else ""
    text = f"{folder} is missing: the source holds optical{end}/ or image{end}/, sar{end}/ and lbl{end}/{more}."
    return Problem("fatal", "missing", str(folder), text)


def _notice(source: Path, cut: Cut) -> str:
    if cut.random:
        return "Tiles are drawn at random: neighbours of test tiles are trained on, so scores will be too high."
    if cut.dates > 1 or not any((source / f"{kind}_2").is_dir() for kind in ("optical", "image", "sar")):
        return ""
    return f"{source} holds a second date, which this build leaves out: --config dates2 reads both."
