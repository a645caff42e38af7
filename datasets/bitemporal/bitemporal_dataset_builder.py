"""The builder of change-detection sets in folders A, B and label; README.md says what is known of each."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from sarjax_datasets import builder
from sarjax_datasets.paired_folder import files, headers
from sarjax_datasets.paired_folder.description import Description, ModalityFiles
from sarjax_datasets.whu_opt_sar import whu_opt_sar_dataset_builder as whu_opt_sar

from sarjax.data.layout import NO_OPTIONS, Layout, Options, Problem, listed, without
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

SIDE = 256
SPLITS = ("train", "val", "test")
LISTS = {split: f"list/{split}.txt" for split in SPLITS}
# Labels are 0 and 255; what resampling or JPEG made of them belongs to the nearer one.
THRESHOLD = 128
LABELS = {value: int(value >= THRESHOLD) for value in range(256)}

CLASSES = (ClassSpec("unchanged", (70, 70, 70)), ClassSpec("changed", (230, 50, 40)))
RGB = (ModalitySpec("optical", tuple(BandSpec(name, "reflectance") for name in ("red", "green", "blue"))),)
SPEC = DatasetSpec("bitemporal", RGB, CLASSES, dates=2)


class Folders(NamedTuple):
    """Names of the folders of images, {sensor: one per date}, and of the labels."""

    images: dict[str, tuple[str, str]]
    label: str

    @property
    def names(self) -> list[str]:
        return [*(name for pair in self.images.values() for name in pair), self.label]


PLAIN = Folders({"optical": ("A", "B")}, "label")


class Kind(NamedTuple):
    """What a configuration reads. spec: None = bands and dtype are those of the files.

    own: its own names of the folders, beside A, B and label where both are names of optical images. labels: {value in
    the files: class}. threshold: see `Layout`. more: what an error adds on where files come from.
    """

    description: str
    own: Folders = PLAIN
    spec: DatasetSpec | None = SPEC
    labels: dict[int, int] = LABELS
    threshold: int | None = THRESHOLD
    more: str = ""

    @property
    def accepted(self) -> list[Folders]:
        return [self.own] if self.own == PLAIN or set(self.own.images) != {"optical"} else [self.own, PLAIN]


KINDS = {
    "levir_cd": Kind("LEVIR-CD: buildings, 637 pairs of 1024 x 1024 pixels."),
    "whu_cd": Kind("WHU-CD: buildings."),
    "clcd": Kind("CLCD: cropland.", Folders({"optical": ("time1", "time2")}, "label")),
    "s2looking": Kind("S2Looking: buildings seen from the side.", Folders({"optical": ("Image1", "Image2")}, "label")),
    # Its authors say that their masks hold 0 and 1; copies may hold 0 and 255. What lies between could be of either.
    "dsifn": Kind(
        "DSIFN: land cover of six cities.",
        Folders({"optical": ("t1", "t2")}, "mask"),
        labels={0: 0, 1: 1} | dict.fromkeys(range(THRESHOLD, 256), 1),
        threshold=None,
    ),
    "sysu_cd": Kind("SYSU-CD: Hong Kong, 256 x 256 pixels.", Folders({"optical": ("time1", "time2")}, "label")),
    "pairs": Kind("A folder of one's own: A/, B/ and label/.", spec=None),
    "synthetic": Kind(
        "Made-up scenes of two dates, optical and radar.",
        Folders({"sar": ("sar", "sar_2"), "optical": ("optical", "optical_2")}, "change"),
        dataclasses.replace(SPEC, modalities=whu_opt_sar.SPEC.modalities),
        more=", which `sarjax data synthesize --dates 2` makes",
    ),
}


class Builder(builder.Builder):
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (what TFDS asks for)
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=kind.description) for name, kind in KINDS.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download by hand (see README.md); the source holds A/, B/ and label/, or these in train/, val/ and test/."
    )

    @classmethod
    def spec_of(cls, config: str = "") -> DatasetSpec:
        """Of `pairs`, whose files say it, what it is where they hold red, green and blue."""
        return KINDS[builder.known_config(cls, config)].spec or SPEC

    @classmethod
    def declared(cls, config: str = "") -> tuple[DatasetSpec, int] | None:
        spec = KINDS[builder.known_config(cls, config)].spec
        return spec and (spec, SIDE)

    @classmethod
    def layout(cls, source: Path, config: str = "", options: Options = NO_OPTIONS) -> Layout:
        """See the base. Of `pairs`, the first header that can be read says bands and dtype."""
        kind = KINDS[builder.known_config(cls, config)]
        places, problems = _places(source, kind)
        scenes, known = [], set()
        for split, folders in places.items():
            prefix = f"{split}/" if split else ""
            found, wrong, names = files.scenes(source / split, _described(folders), prefix)
            scenes += found
            problems += wrong
            known |= names
        chosen = without(scenes, options.exclude, known)
        splits, notice = {scene.name: scene.name.split("/")[0] for scene in chosen}, ""
        if "" in places and chosen:
            described = _described(places[""])
            splits, wrong, notice = files.splits(source, described, [scene.name for scene in chosen], known)
            problems += wrong
        spec = kind.spec
        if spec is None:
            spec, wrong = headers.spec(_described(PLAIN), chosen)
            problems += wrong
        return Layout(
            spec,
            kind.labels,
            chosen,
            splits,
            tuple(problems),
            SIDE,
            notice=notice,
            threshold=kind.threshold,
        )


def _places(source: Path, kind: Kind) -> tuple[dict[str, Folders], list[Problem]]:
    """({split: its folders}, problems) of a source; the split "" is that of folders which hold all scenes."""
    names = list(dict.fromkeys(name for folders in kind.accepted for name in folders.names))
    there = {part: [n for n in names if (source / part / n).is_dir()] for part in ("", *SPLITS)}
    found = [part for part, some in there.items() if some]
    if "" in found and len(found) > 1:
        text = (
            f"{source} holds both {there[''][0]}/ and {found[1]}/{there[found[1]][0]}/: folders of all scenes, or "
            "folders of each split, are accepted."
        )
        return {}, [Problem("fatal", "split", str(source), text)]
    # Where one split has its folders, one that lacks them is no less wrong than one that lacks a date.
    parts = [part for part in SPLITS if (source / part).is_dir()] if found and "" not in found else [""]
    places, problems = {}, []
    for part in parts:
        images = next((f.images for f in kind.accepted if set(f.names[:-1]) <= set(there[part])), None)
        label = next((f.label for f in kind.accepted if f.label in there[part]), None)
        if images and label:
            places[part] = Folders(images, label)
            continue
        wanted = ", or ".join(f"{listed(f.names[:-1])} and {f.label}" for f in kind.accepted)
        text = (
            f"{source / part} holds {listed(there[part]) or 'none'} of the folders {wanted}{kind.more}: all are "
            f"expected there{'' if found else ', or in its folders train, val and test'}."
        )
        problems.append(Problem("fatal", "missing", str(source / part), text))
    return places, problems


def _described(folders: Folders) -> Description:
    """The description by which files are found and, where no spec says it, bands and dtype."""
    modalities = tuple(
        ModalityFiles(name, pair, ("", ""), None, ("reflectance",), None, None, 1, ())
        for name, pair in folders.images.items()
    )
    return Description(
        SPEC.name, SIDE, False, modalities, folders.label, "", CLASSES, LABELS, (), LISTS, own_splits=False
    )
