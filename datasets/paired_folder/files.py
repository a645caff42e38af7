"""Which files of a folder make a scene, and which scenes make a split; opens nothing but the lists of names."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sarjax_datasets.paired_folder.description import Description

from sarjax import raster
from sarjax.data.layout import Problem, Scene, listed, missing, read_names, split_by_order, without_ending
from sarjax.errors import UserError


def scenes(source: Path, description: Description, prefix: str = "") -> tuple[list[Scene], list[Problem], set[str]]:
    """The complete scenes of `source` by name, what is missing of others, and the names of all.

    prefix: begins every scene's name, where one data set has several sources.
    """
    places = {
        m.name: [(source / folder, suffix) for folder, suffix in zip(m.folders, m.suffixes, strict=True)]
        for m in description.modalities
    }
    every = [place for group in places.values() for place in group]
    label_place = None
    if description.label_folder is not None:
        label_place = source / description.label_folder, description.label_suffix
        every.append(label_place)
    problems = [
        Problem("fatal", "missing", str(folder), f"{folder} is missing: the description says that files are there.")
        for folder in dict.fromkeys(folder for folder, _ in every)
        if not folder.is_dir()
    ]
    if problems:
        return [], problems, set()
    found: dict[tuple[Path, str], dict[str, Path]] = {}
    ambiguous: set[str] = set()
    for place in dict.fromkeys(every):
        found[place], twice = _files(*place, prefix)
        problems += twice
        ambiguous |= {problem.where for problem in twice}
    names = sorted(set().union(*found.values()) - ambiguous)
    complete = []
    for name in names:
        gone = [(folder, suffix) for folder, suffix in dict.fromkeys(every) if name not in found[folder, suffix]]
        problems += [missing(name, folder / f"{name.removeprefix(prefix)}{suffix}.*") for folder, suffix in gone]
        if not gone:
            images = {m: tuple(found[place][name] for place in group) for m, group in places.items()}
            complete.append(Scene(name, images, found[label_place][name] if label_place else None))
    if not complete:
        text = f"{source} holds no scene with a file in each of {listed(sorted({str(f) for f, _ in every}))}"
        text += f": files of one name ({', '.join(raster.READABLE)}) are expected there."
        problems.insert(0, Problem("fatal", "missing", str(source), text))
    return complete, problems, {*names, *ambiguous}


def _files(folder: Path, suffix: str, prefix: str) -> tuple[dict[str, Path], list[Problem]]:
    """({scene: file}, problems) of all of a folder; a scene's name is its file's, without suffix and ending."""
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        named = path.suffix.lower() in raster.READABLE and path.stem.endswith(suffix) and path.stem != suffix
        if hidden or not named or not path.is_file():
            continue
        name = prefix + inner.with_suffix("").as_posix().removesuffix(suffix)
        if name in found:
            text = f"{found[name]} and {path} are both of scene {name}: it is left out, one of them is accepted."
            problems.append(Problem("warning", "missing", name, text))
        found.setdefault(name, path)
    return found, problems


def splits(
    source: Path, description: Description, complete: Sequence[str], known: Iterable[str]
) -> tuple[dict[str, str], list[Problem], str]:
    """({scene: split}, problems, a line for the user) of the `complete` scenes.

    known: names of scenes that may be listed though they are not built: what is missing of them has been said.
    """
    listed_in: dict[str, list[tuple[str, Path]]] = {}
    problems: list[Problem] = []
    unknown: dict[Path, list[str]] = {}
    plain = _plain(description, {*complete, *known})
    paths = {split: source / file for split, file in description.split_files.items()}
    there = {split: path for split, path in paths.items() if path.is_file()}
    for path in paths.values() if description.own_splits else ():
        if not path.is_file():
            text = f"{path} is missing: the description says that it lists the scenes of a split."
            problems.append(Problem("fatal", "split", str(path), text))
    if not there:
        return split_by_order(complete), problems, _by_order(source, len(complete))
    for split, path in there.items():
        try:
            lines = read_names(path)
        except UserError as e:
            problems.append(Problem("fatal", "split", str(path), str(e)))
            continue
        for line in lines:
            name = plain(line)
            if name is None:
                unknown.setdefault(path, []).append(line)
            elif (split, path) in listed_in.get(name, ()):
                problems.append(Problem("warning", "split", str(path), f"{path} lists {line} twice: once is enough."))
            else:
                listed_in.setdefault(name, []).append((split, path))
    for name, at in listed_in.items():
        if len(at) > 1:
            text = f"{at[0][1]} and {at[1][1]} both list {name}: a scene is in one split."
            problems.append(Problem("fatal", "split", name, text))
    for path, lines in unknown.items():
        text = f"{path} lists {len(lines)} name(s) that no scene has: {listed(lines)}."
        problems.append(Problem("warning", "split", str(path), text))
    unlisted = [name for name in complete if name not in listed_in]
    if unlisted:
        text = f"{len(unlisted)} scene(s) are in no split and left out: {listed(unlisted)}."
        problems.append(Problem("warning", "split", str(source), text))
    chosen = {name: listed_in[name][0][0] for name in complete if name in listed_in}
    return chosen, problems, ""


def _plain(description: Description, names: set[str]) -> Callable[[str], str | None]:
    """What a line of a split's file calls: a scene's name, or the name of one of its files; None for neither."""
    suffixes = {suffix for m in description.modalities for suffix in m.suffixes} | {description.label_suffix}

    def plain(line: str) -> str | None:
        stems = [line, without_ending(line)]
        candidates = stems + [stem.removesuffix(suffix) for stem in stems for suffix in sorted(suffixes)]
        return next((c for c in candidates if c in names), None)

    return plain


def _by_order(source: Path, scenes: int) -> str:
    if scenes < 3:
        return f"{source} has no files of splits: all of its {scenes} scene(s) are training data."
    return f"{source} has no files of splits: in every ten of its {scenes} scenes by name 7 are train, 1 val, 2 test."
