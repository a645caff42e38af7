"""`sarjax data check`: everything that is wrong with a data set's files, found in one go before anything is built.

Every file is decoded once, window by window, so that memory does not grow with scenes; one bad file stops no other.
"""

import dataclasses
import filecmp
import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sarjax.data.build import Progress, builder_class
from sarjax.data.layout import (
    NO_OPTIONS,
    Layout,
    Options,
    Problem,
    Scene,
    check_scene,
    in_words,
    off_scale,
    tile_origins,
)
from sarjax.data.tally import Tally, tally
from sarjax.errors import UserError
from sarjax.spec import IGNORE_LABEL

KINDS: Mapping[str, str] = {
    "description": "The description of the data set contradicts itself or its files; correct it.",
    "missing": "A scene lacks files, or a published scene is not there; download them, or go on without.",
    "unreadable": "A file is empty, truncated, too large to be true or no image; download or copy it again.",
    "size": "The files of a scene must have the same width and height, at least those of a tile.",
    "bands": "A file has not as many bands as the data set's description says; it may be another product.",
    "dtype": "A file holds another type of number than the data set's description says; convert it.",
    "georeference": "The files of a scene lie in different places or projections; resample them onto one grid.",
    "labels": "Label files hold values of no class, or on another scale; map them to a class or to be ignored.",
    "split": "A split has no scenes, or a scene is in no split or in two; correct the lists.",
    "duplicate": "The same image lies in two splits, or is given for two dates; take one out, or find the right one.",
    "alignment": "What is labelled water does not look like water; the labels may be shifted, or of another scene.",
    "no-data": "Little or nothing was seen there: check no_data and transforms; what no sensor saw is ignored.",
    "absent class": "No pixel of a split has this class; it cannot be learned there, or not be measured.",
}
# NDWI on water minus elsewhere is +.18 to +.23 in aligned scenes and about 0 in shifted ones: half of the least.
WATER_CONTRAST = 0.09
# A scene is not judged by fewer pixels of water, or of anything else, than this, nor by a smaller share of them.
JUDGED_PIXELS, JUDGED_SHARE = 1000, 0.001
# An image with a larger share of no-data than this is flagged: often it is the description that does not fit.
MOST_NO_DATA = 0.5
# Problems of one kind that the text shows; JSON has them all.
SHOWN = 10
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the doctor found.

    Splits are those of the layout, or "all" where tiles are drawn at random, or "none" where it has none.
    files: how many were looked at. scenes, tiles: {split: how many}; a scene whose files disagree in size has no tiles.
    classes: {split: pixels per class}, whole label files counted, whatever the tiles cover. ignored: {split: pixels}.
    unknown: {label file: {value without a meaning: pixels}}. no_data: {modality: share of pixels}, None if none was
    read. empty_tiles: {scene: tiles in which no sensor saw anything}, where there are any. ndwi: {scene: mean NDWI on
    water minus elsewhere, per date}, None where there are too few pixels to judge. Files that could not be read to
    their end are in none of these counts.
    """

    dataset: str
    class_names: tuple[str, ...]
    files: int
    scenes: Mapping[str, int]
    tiles: Mapping[str, int]
    classes: Mapping[str, tuple[int, ...]]
    ignored: Mapping[str, int]
    unknown: Mapping[str, Mapping[int, int]]
    no_data: Mapping[str, float | None]
    empty_tiles: Mapping[str, int]
    ndwi: Mapping[str, tuple[float | None, ...]]
    problems: tuple[Problem, ...]

    @property
    def fatal(self) -> bool:
        """Whether a build would stop."""
        return any(p.severity == "fatal" for p in self.problems)

    @property
    def exit_code(self) -> Literal[0, 1]:
        """0 = fine or warnings only, 1 = something is fatal."""
        return 1 if self.fatal else 0


def run(
    name: str,
    source: str | os.PathLike,
    config: str = "",
    options: Options = NO_OPTIONS,
    progress: Progress | None = None,
) -> Report:
    """Checks the files of data set `name` in `source`.

    config: "" = the builder's default. options: scenes to leave out, the description of a folder of one's own.
    progress: see `check`. UserError for what keeps the files from being listed: an unknown name, configuration or
    scene to leave out, a source that is no folder, a description that is missing or wrong.
    """
    cls = builder_class(name)
    source = Path(source).expanduser().absolute()
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: --source takes the folder of the downloaded data set.")
    return check(cls.layout(source, config, options), progress)


def check(layout: Layout, progress: Progress | None = None) -> Report:
    """Reads every file that a build of `layout` reads, and reports all that is wrong.

    The order of scenes makes no difference. progress: called as (stage, scenes done, scenes in all).
    """
    problems, read = list(layout.problems), []
    # Where the splits could not be made out, all scenes would be built once they can.
    every = layout.random or not layout.splits
    scenes = [scene for scene in layout.scenes if every or scene.name in layout.splits]
    for done, scene in enumerate(scenes):
        if progress:
            progress("check", done, len(scenes))
        size, found = check_scene(scene, layout.spec, layout.tile)
        opaque = frozenset(Path(p.where) for p in found if p.kind in ("bands", "dtype"))
        tiles = 0
        if not any(p.kind in ("size", "unreadable") for p in found):
            tiles = int(np.prod([len(tile_origins(n, layout.tile, layout.cover)) for n in size]))
        split = "all" if layout.random else layout.splits.get(scene.name, "none")
        one = _Read(scene, split, tiles, tally(scene, layout, opaque))
        problems += found + _scene_problems(one, layout)
        read.append(one)
    read.sort(key=lambda one: one.scene.name)
    report = _count(layout, read)
    highest = {one.scene.name: max(one.counts.labels, default=0) for one in read}
    problems += off_scale(layout, lambda scene: highest[scene.name])
    problems += _split_problems(layout, report, read) + _duplicates(layout, read)
    if progress:
        progress("check", len(scenes), len(scenes))
    kinds = [*KINDS, *sorted({p.kind for p in problems} - set(KINDS))]
    ordered = sorted(set(problems), key=lambda p: (p.severity, kinds.index(p.kind), p.where, p.text))
    return dataclasses.replace(report, problems=tuple(ordered))


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON takes it: all problems, keys as in `Report`, and what their kinds mean."""
    classes = {
        split: dict(zip(report.class_names, pixels, strict=True)) | {"ignored": report.ignored[split]}
        for split, pixels in report.classes.items()
    }
    return {
        "dataset": report.dataset,
        "fatal": report.fatal,
        "files": report.files,
        "scenes": dict(report.scenes),
        "tiles": dict(report.tiles),
        "classes": classes,
        "unknown": {path: {str(v): n for v, n in values.items()} for path, values in report.unknown.items()},
        "no_data": dict(report.no_data),
        "empty_tiles": dict(report.empty_tiles),
        "ndwi": {scene: list(by_date) for scene, by_date in report.ndwi.items()},
        "problems": [p._asdict() for p in report.problems],
        "kinds": {kind: KINDS[kind] for kind in KINDS if kind in {p.kind for p in report.problems}},
    }


def render(report: Report) -> str:
    """The report as text: counts, then the problems by kind, the first 10 of each, and what to do about them."""
    splits = list(report.scenes)
    rows = [["", *splits]]
    rows += [[what, *(f"{n[s]:,}" for s in splits)] for what, n in (("scenes", report.scenes), ("tiles", report.tiles))]
    totals = {s: sum(report.classes[s]) for s in splits}
    for i, name in enumerate(report.class_names):
        counts = [(report.classes[s][i], totals[s]) for s in splits]
        rows.append([name, *(f"{n:,} ({n / max(total, 1):7.3%})" for n, total in counts)])
    rows.append(["(ignored)", *(f"{report.ignored[s]:,}" for s in splits)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{report.dataset}: {report.files:,} files; scenes, tiles and pixels of each class by split:"]
    lines += [
        "  ".join([f"  {row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    shares = [f"{m} {share:.2%}" for m, share in report.no_data.items() if share is not None]
    if shares:
        lines.append(f"no data: {', '.join(shares)} of all pixels.")
    judged = [d for by_date in report.ndwi.values() for d in by_date if d is not None]
    if judged:
        lines.append(f"NDWI on water minus elsewhere: {min(judged):+.3f} to {max(judged):+.3f}.")
    for severity in ("fatal", "warning"):
        kinds = [p.kind for p in report.problems if p.severity == severity]
        for kind in dict.fromkeys(kinds):
            texts = [p.text for p in report.problems if (p.severity, p.kind) == (severity, kind)]
            lines += ["", f"{severity}, {kind} ({len(texts)}): {KINDS.get(kind, '')}".rstrip(" :")]
            lines += [f"  {text}" for text in texts[:SHOWN]]
            if len(texts) > SHOWN:
                lines.append(f"  and {len(texts) - SHOWN} more.")
    count = Counter(p.severity for p in report.problems)
    lines += ["", f"{count['fatal']} fatal problem(s), {count['warning']} warning(s)."]
    return "\n".join(lines)


class _Read(NamedTuple):
    """A scene and what was read of it. tiles: how many it is cut into, 0 if its files do not agree in size."""

    scene: Scene
    split: str
    tiles: int
    counts: Tally


def _count(layout: Layout, read: list[_Read]) -> Report:
    """The report without its problems."""
    spec = layout.spec
    found = {one.split for one in read}
    splits = [s for s in SPLITS if s in found] + sorted(found - set(SPLITS))
    classes = {s: [0] * spec.num_classes for s in splits}
    ignored, unknown_values = dict.fromkeys(splits, 0), {}
    for one in read:
        for value, pixels in one.counts.labels.items():
            index = layout.labels.get(value)
            if index is None:
                unknown_values.setdefault(str(one.scene.label), {})[value] = pixels
            elif index == IGNORE_LABEL:
                ignored[one.split] += pixels
            else:
                classes[one.split][index] += pixels
    no_data: dict[str, float | None] = {}
    for m in spec.modality_names:
        paths = [(one.counts, path) for one in read for path in one.scene.images[m]]
        pixels = sum(counts.pixels[path] for counts, path in paths)
        no_data[m] = 1 - sum(counts.valid[path] for counts, path in paths) / pixels if pixels else None
    return Report(
        dataset=spec.name,
        class_names=spec.class_names,
        files=sum(len(set(one.scene.files)) for one in read),
        scenes={s: sum(one.split == s for one in read) for s in splits},
        tiles={s: sum(one.tiles for one in read if one.split == s) for s in splits},
        classes={s: tuple(n) for s, n in classes.items()},
        ignored=ignored,
        unknown={path: dict(sorted(values.items())) for path, values in unknown_values.items()},
        no_data=no_data,
        empty_tiles={one.scene.name: one.counts.empty for one in read if one.counts.empty},
        ndwi={one.scene.name: tuple(map(_contrast, one.counts.water)) for one in read} if layout.water else {},
        problems=(),
    )


def _contrast(water: np.ndarray) -> float | None:
    """Mean NDWI on water minus elsewhere of (2, 2) sums and pixels; None where there are too few to judge by."""
    (elsewhere, land), (on_water, wet) = water
    if min(land, wet) < max(JUDGED_PIXELS, JUDGED_SHARE * (land + wet)):
        return None
    return float(on_water / wet - elsewhere / land)


def _scene_problems(one: _Read, layout: Layout) -> list[Problem]:
    """What only the pixels of a scene show."""
    scene, counts = one.scene, one.counts
    problems = [Problem("fatal", "unreadable", str(path), text) for path, text in counts.broken.items()]
    unknown_values = {v: n for v, n in sorted(counts.labels.items()) if v not in layout.labels}
    if unknown_values:
        total = counts.labels.total()
        some = [f"{v} ({n:,} pixels, {n / total:.3%})" for v, n in list(unknown_values.items())[:SHOWN]]
        more = f" and {len(unknown_values) - SHOWN} more values" if len(unknown_values) > SHOWN else ""
        known = in_words(layout.labels)
        text = f"{scene.label} holds {', '.join(some)}{more}, which stand for no class: labels are {known}."
        problems.append(Problem("fatal", "labels", str(scene.label), text))
    blind = [path for path, pixels in counts.pixels.items() if pixels and not counts.valid[path]]
    if counts.empty:
        text = f"{counts.empty} of {one.tiles} tiles of {scene.name} hold no data: no sensor saw anything there."
        problems.append(Problem("warning", "no-data", scene.name, text))
    if not (counts.empty and counts.empty == one.tiles):
        for path in blind:
            problems.append(Problem("warning", "no-data", str(path), f"{path} holds no data: no pixel of it is valid."))
    for path, valid in counts.valid.items():
        share = 1 - valid / max(counts.pixels[path], 1)
        if valid and share > MOST_NO_DATA:
            text = f"{path} holds no data in {math.floor(share * 10_000) / 100:.2f} % of its pixels."
            problems.append(Problem("warning", "no-data", str(path), text))
    for modality, paths in scene.images.items():
        for date, path in enumerate(paths):
            first = next((i for i in range(date) if _same(paths[i], path, counts)), None)
            if first is not None:
                text = (
                    f"The {modality} images of dates {first + 1} and {date + 1} of {scene.name} are one and the same: "
                    "nothing can have changed between them, images of two dates are expected."
                )
                problems.append(Problem("warning", "duplicate", scene.name, text))
    for contrast in map(_contrast, counts.water):
        if contrast is not None and contrast < WATER_CONTRAST:
            text = (
                f"NDWI on what {scene.name} labels as water is {contrast:+.3f} above that of other pixels, less than "
                f"{WATER_CONTRAST:+.2f}: its labels may be shifted, or of another scene."
            )
            problems.append(Problem("warning", "alignment", scene.name, text))
    return problems


def _same(a: Path, b: Path, counts: Tally) -> bool:
    """Whether two files are equal, byte for byte, and not because nothing was seen in either.

    One file for two dates is meant so: a sensor that has seen one date only.
    """
    return a != b and bool(counts.valid[a] and counts.valid[b]) and filecmp.cmp(a, b, shallow=False)


def _split_problems(layout: Layout, report: Report, read: list[_Read]) -> list[Problem]:
    """Splits without scenes, and classes that no label of a split has."""
    problems = []
    stopped = any(p.severity == "fatal" and p.kind in ("split", "missing") for p in layout.problems)
    if not (read or stopped):
        problems.append(Problem("fatal", "missing", layout.spec.name, f"No scene of {layout.spec.name} is complete."))
    elif not (layout.random or "train" in report.scenes or stopped):
        text = f"{layout.spec.name} has no complete scene in train: there would be nothing to learn from."
        problems.append(Problem("fatal", "split", "train", text))
    for split, pixels in report.classes.items():
        unread = sum(one.split == split and not one.counts.labels for one in read)
        if split == "none" or unread == report.scenes[split]:
            continue  # nothing is known of its labels, and why has been said
        effect = {"train": "it cannot be learned", "all": "it can neither be learned nor measured"}
        but = f" (labels of {unread} scenes could not be read)" if unread else ""
        for name, n in zip(report.class_names, pixels, strict=True):
            if not n:
                text = f"Class {name} has no pixel in {split}{but}: {effect.get(split, 'it cannot be measured there')}."
                problems.append(Problem("warning", "absent class", split, text))
    return problems


def _duplicates(layout: Layout, read: list[_Read]) -> list[Problem]:
    """Images that are the same, byte for byte, in scenes of different splits; those without any data do not count."""
    by_size: dict[int, list[tuple[_Read, str, Path]]] = defaultdict(list)
    for one in read:
        for modality, paths in one.scene.images.items():
            for path in (p for p in paths if one.counts.valid[p]):
                by_size[path.stat().st_size].append((one, modality, path))
    by_content: dict[str, list[tuple[_Read, str, Path]]] = defaultdict(list)
    for files in by_size.values():
        if _leaks(layout, [one for one, _, _ in files]):
            for file in files:
                with file[2].open("rb") as f:
                    by_content[hashlib.file_digest(f, "sha256").hexdigest()].append(file)
    same: dict[frozenset[str], set[str]] = defaultdict(set)
    for files in by_content.values():
        if _leaks(layout, [one for one, _, _ in files]):
            same[frozenset(one.scene.name for one, _, _ in files)] |= {modality for _, modality, _ in files}
    splits = {one.scene.name: one.split for one in read}
    problems = []
    for scenes, modalities in same.items():
        names = sorted(scenes)
        some = ", ".join(f"{name} ({splits[name]})" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        text = (
            f"The {' and '.join(sorted(modalities))} image is the same in {some}{more}: scenes of one split only may."
        )
        problems.append(Problem("warning", "duplicate", names[0], text))
    return problems


def _leaks(layout: Layout, scenes: list[_Read]) -> bool:
    """Whether tiles of some of `scenes` may be in different splits."""
    if layout.random:
        return len({one.scene.name for one in scenes}) > 1
    return len({one.split for one in scenes}) > 1
