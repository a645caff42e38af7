"""Verbs of data sets: build, check, stats, show, synthesize."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli.common import Verb, command, dispatch, note, print_json, size_of


def build(
    name: Positional[str],
    source: Path,
    out: Path | None = None,
    config: str = "",
    jobs: int = 1,
    compression: Literal["zstd", "zlib", "none"] = "zstd",
    exclude: Path | None = None,
    description: Path | None = None,
    overwrite: FlagCreatePairsOff[bool] = False,
) -> None:
    """Build a data set's records from its files

    Args:
        name: which data set.
        source: the folder that its files were unpacked to.
        out: where records go (default: $SARJAX_DATA_DIR, else ~/sarjax_data).
        config: a configuration of the builder ("" = its default).
        jobs: processes that read and compress; the records are the same for any number.
        compression: of the records: zlib is a little smaller and read several times more slowly, none the other way.
        exclude: a text file of scenes to leave out, one name a line.
        description: what a user's own folders hold (paired_folder; default: SOURCE/dataset.toml).
        overwrite: build again what is there.
    """
    from sarjax.data.build import build as run
    from sarjax.data.build import console_progress

    options = _options(exclude, description)
    with console_progress(f"build {name}") as progress:
        path = run(
            name,
            source,
            out,
            config,
            jobs=jobs,
            compression=compression,
            options=options,
            overwrite=overwrite,
            progress=progress,
            say=note,
        )
    print(path)


def check(
    name: Positional[str],
    source: Path,
    config: str = "",
    exclude: Path | None = None,
    description: Path | None = None,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Check a data set's files before anything is built: every problem at once; exit code 1 where one is fatal

    Args:
        name: which data set.
        source: the folder that its files were unpacked to.
        config: a configuration of the builder ("" = its default).
        exclude: a text file of scenes to leave out, one name a line.
        description: what a user's own folders hold (paired_folder; default: SOURCE/dataset.toml).
        json: print JSON instead of text.
    """
    from sarjax.data import doctor
    from sarjax.data.build import console_progress

    with console_progress(f"check {name}") as progress:
        report = doctor.run(name, source, config, _options(exclude, description), progress)
    if json:
        print_json(doctor.to_dict(report))
    else:
        print(doctor.render(report))
    if report.fatal:
        sys.exit(1)


def _options(exclude: Path | None, description: Path | None) -> Any:
    from sarjax.data.layout import Options, read_names

    return Options(exclude=read_names(exclude) if exclude else (), description=description)


def stats(directory: Positional[Path]) -> None:
    """Compute the statistics of built records again

    Args:
        directory: the folder of the records, as `sarjax data build` prints it.
    """
    from sarjax.data.build import console_progress
    from sarjax.data.statistics import write

    with console_progress("statistics") as progress:
        print(write(directory, progress=progress))


def show_data(
    name: Positional[str],
    config: str = "",
    data_dir: str = "",
    split: str = "train",
    tiles: int = 8,
    out: Path = Path("tiles.png"),
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Show a data set: a sheet of tiles and labels, and its classes

    Args:
        name: which data set, or the folder of its records.
        config: a configuration of the builder ("" = its default).
        data_dir: where built records are ("" = $SARJAX_DATA_DIR, else ~/sarjax_data).
        split: which split.
        tiles: how many tiles to draw.
        out: the PNG to write.
        json: print JSON instead of text.
    """
    from sarjax.data.store import open_dataset, open_directory
    from sarjax.reports.sheet import class_histogram, sheet

    dataset = open_directory(name) if Path(name).is_dir() else open_dataset(name, config, data_dir)
    sheet(dataset, split, out, tiles)
    rows = class_histogram(dataset)
    if json:
        print_json({"name": dataset.spec.name, "fingerprint": dataset.fingerprint, "classes": rows})
    else:
        print(f"{dataset.spec.name}: " + ", ".join(f"{n} {s}" for s, n in dataset.statistics.tiles.items()) + " tiles")
        for row in rows:
            print(f"  {row['class']:<14} {row['share']:8.3%}  {row['pixels']:>14,}")
    note(f"written: {out}")


def synthesize(out: Path, scenes: int = 6, size: str = "1024x1024", seed: int = 0, dates: Literal[1, 2] = 1) -> None:
    """Make plausible optical and SAR scenes with labels, in WHU-OPT-SAR's format

    Args:
        out: the folder to make.
        scenes: how many.
        size: WxH in pixels.
        seed: the same seed makes the same scenes.
        dates: 2 adds a second date, with seasonal change and parcels that change class.
    """
    from sarjax.data.build import console_progress
    from sarjax.data.synthesis import synthesize as run

    with console_progress("synthesize") as progress:
        print(run(out, scenes, size_of(size), seed, dates, progress=progress))


DATA: dict[str, Verb] = {
    "check": command("data check", check),
    "build": command("data build", build),
    "stats": command("data stats", stats),
    "show": command("data show", show_data),
    "synthesize": command("data synthesize", synthesize),
}


def data_verb(args: Sequence[str]) -> None:
    """Check, build, inspect and synthesize data sets"""
    dispatch("sarjax data", DATA, args)
