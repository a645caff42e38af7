"""`sarjax data build`: from the files of a published data set to records, in one move.

Everything is written under a temporary name beside its place and renamed at the end, so what carries a data set's name
is finished, and a build that was killed can simply be run again.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sarjax.data import statistics
from sarjax.data.layout import NO_OPTIONS, Layout, Options, listed, without_ending
from sarjax.data.store import SPEC_FILE, STATISTICS_FILE, data_root
from sarjax.errors import UserError, unknown
from sarjax.files import lock, write_atomically

# Beside the records and outside of their fingerprint: what they were built from, to tell another description by.
LAYOUT_FILE = "layout.json"

Progress = Callable[[str, int, int], None]


def builders() -> Mapping[str, str]:
    """{name: module} of the builders: every folder under `datasets/` that holds one."""
    import sarjax_datasets

    found = (p.name for p in pkgutil.iter_modules(sarjax_datasets.__path__) if p.ispkg)
    return {name: f"sarjax_datasets.{name}.{name}_dataset_builder" for name in sorted(found)}


def builder_class(name: str) -> Any:
    """The TFDS builder called `name`; UserError, with the nearest name, if there is none."""
    known = builders()
    if name not in known:
        raise unknown("data set", name, known)
    return importlib.import_module(known[name]).Builder


def build(
    name: str,
    source: str | os.PathLike,
    out: str | os.PathLike | None = None,
    config: str = "",
    *,
    overwrite: bool = False,
    jobs: int = 1,
    compression: str = "zstd",
    options: Options = NO_OPTIONS,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Builds data set `name` from the files in `source` into `out`/name/[config/]version, as TFDS lays it out.

    out: None = $SARJAX_DATA_DIR, else ~/sarjax_data. config: "" = the builder's default. overwrite: replace what is
    there; otherwise a finished build is left alone, and refused where it was built from something else. jobs: processes
    that read and encode; the records are the same to the byte. compression: "zstd", "zlib" (smaller, slower to read) or
    "none" (larger, quicker): the records hold the same, under another fingerprint. options: scenes to leave out, the
    description of a folder of one's own. progress: called as (stage, done, total). say: gets a line or two.
    Returns the folder of the records. Raises UserError for a bad source, an unknown name or an `out` it cannot write.
    """
    cls = builder_class(name)
    source, root = Path(source).expanduser().absolute(), data_root(out).absolute()
    if jobs < 1:
        raise UserError(f"jobs is {jobs}: at least 1 process is needed.")
    known = importlib.import_module("sarjax_datasets.rows").COMPRESSIONS
    if compression not in known:
        raise unknown("compression", compression, known)
    _check_source(source)
    layout = cls.layout(source, config, options)
    chosen = cls.tfds_config(config, layout)
    config = getattr(chosen, "name", chosen) or ""
    with _workplace(root, f"{name}-{config}" if config else name) as temporary:
        settings = {"config": chosen} if chosen else {}
        builder = cls(layout=layout, compression=compression, data_dir=temporary, **settings)
        final = root / Path(builder.data_dir).relative_to(temporary)
        if (final / STATISTICS_FILE).is_file() and not overwrite:
            _check_same(final, layout, _facts(layout, source, options, compression))
            say(f"{final} is built already: --overwrite builds it again.")
            return final
        builder.progress, builder.say, builder.jobs = progress, say, jobs
        if layout.notice:
            say(layout.notice)
        _run(builder, source, temporary)
        made = Path(builder.data_dir)
        write_atomically(made / SPEC_FILE, layout.spec.to_json())
        write_atomically(made / LAYOUT_FILE, json.dumps(_facts(layout, source, options, compression), indent=1) + "\n")
        statistics.write(made, progress)
        _publish(made, final, temporary, builder.HAS_DEFAULT)
    return final


@contextlib.contextmanager
def console_progress(what: str) -> Iterator[Progress]:
    """A progress callback: a bar on a terminal, else about ten lines per stage on standard error."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: _line(what, stage, done, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{what} {stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _line(what: str, stage: str, done: int, total: int) -> None:
    if done == total or (done and done % max(total // 10, 1) == 0):
        print(f"{what} {stage}: {done}/{total}", file=sys.stderr, flush=True)


def _check_source(source: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: --source takes the folder of the downloaded data set.")
    if not any(source.iterdir()):
        raise UserError(f"{source} is empty: --source takes the folder of the downloaded data set.")


@contextlib.contextmanager
def _workplace(root: Path, name: str) -> Iterator[Path]:
    """An empty folder under `root`, held by one process, cleaned of what a killed build left, gone at the end."""
    folder = root / f".building-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"cannot write to {root}: {e.strerror}; --out takes a folder that may be written to.") from e
    try:
        lock(handle, f"another build of {name} is running in {root}: wait for it, or use another --out.")
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _facts(layout: Layout, source: Path, options: Options, compression: str) -> dict[str, Any]:
    """What the records of `layout` follow from, besides its spec and what is in the files."""
    scenes = [scene for scene in layout.scenes if layout.random or scene.name in layout.splits]
    files = [
        [key, (path.relative_to(source) if path.is_relative_to(source) else path).as_posix()]
        for scene in scenes
        for key, paths in (*sorted(scene.images.items()), ("label", (scene.label,) if scene.label else ()))
        for path in paths
    ]
    return {
        "labels": {str(value): index for value, index in sorted(layout.labels.items())},
        "tile": layout.tile,
        "cover": layout.cover,
        "random": layout.random,
        "compression": compression,
        "excluded": sorted({without_ending(name) for name in options.exclude}),
        "scenes": len(scenes),
        "scenes_sha256": _digest([scene.name for scene in scenes]),
        "splits_sha256": _digest([layout.splits.get(scene.name) for scene in scenes]),
        "files_sha256": _digest(files),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_same(final: Path, layout: Layout, now: Mapping[str, Any]) -> None:
    """UserError where what is built in `final` is not what would be built from `layout`, whose facts are `now`.

    Of builds that keep no facts the specs alone are compared.
    """
    changes = []
    if (final / SPEC_FILE).read_text(encoding="utf-8") != layout.spec.to_json():
        changes.append("other bands, classes or no-data values")
    if (final / LAYOUT_FILE).is_file():
        try:
            changes += _changes(dict(json.loads((final / LAYOUT_FILE).read_text(encoding="utf-8"))), now)
        except (OSError, ValueError, TypeError, AttributeError):
            changes.append(f"its {LAYOUT_FILE} cannot be read")
    if changes:
        raise UserError(
            f"{final} holds other records than would be built now ({'; '.join(changes)}): --overwrite builds it again, "
            "and another name or --out keeps both."
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    before = {**now, **before}
    values = {**before["labels"], **now["labels"]}
    other = [value for value in values if before["labels"].get(value) != now["labels"].get(value)]
    changes = [f"other meanings of the label values {listed(other)}"] if other else []
    for key in ("tile", "cover", "random", "compression"):
        if before[key] != now[key]:
            changes.append(f"{key} is {str(now[key]).lower()}, not {str(before[key]).lower()}")
    if before["scenes_sha256"] != now["scenes_sha256"]:
        more = now["scenes"] - before["scenes"]
        what = f"{abs(more)} scene{'s' if abs(more) > 1 else ''} {'more' if more > 0 else 'fewer'}"
        changes.append(what if more else "other scenes")
        if before["excluded"] != now["excluded"]:
            lists = (listed(names, 3) or "none" for names in (now["excluded"], before["excluded"]))
            changes.append("excluded: {}; before: {}".format(*lists))
    elif before["splits_sha256"] != now["splits_sha256"]:
        changes.append("other splits of the same scenes")
    elif before["files_sha256"] != now["files_sha256"]:
        changes.append("other files of the same scenes")
    return changes


def _run(builder: Any, source: Path, temporary: Path) -> None:
    import tensorflow_datasets as tfds

    download = tfds.download.DownloadConfig(manual_dir=source, try_download_gcs=False)
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(
            download_dir=temporary / "downloads", download_config=download, file_format="array_record"
        )
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cannot write records to {temporary.parent}, where no room is left: free some, or choose another "
                "--out."
            ) from e
        raise UserError(f"cannot write records to {temporary.parent}: {e.strerror or e}.") from e


def _publish(made: Path, final: Path, temporary: Path, has_default: bool) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    default = made.parent.parent / ".config" / "metadata.json"
    if has_default and default.is_file():
        # TFDS keeps the name of the default configuration beside the configurations.
        (final.parent.parent / ".config").mkdir(exist_ok=True)
        os.replace(default, final.parent.parent / ".config" / "metadata.json")
    if final.exists():
        os.rename(final, temporary / "replaced")
    os.rename(made, final)
