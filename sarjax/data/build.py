"""`sarjax data build`: from the files of a published data set to records, in one move.

Everything is written under a temporary name beside its place and renamed at the end, so what carries a data set's name
is finished, and a build that was killed can simply be run again.
"""

import contextlib
import fcntl
import importlib
import os
import pkgutil
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sarjax.data import statistics
from sarjax.data.layout import NO_OPTIONS, Options
from sarjax.data.store import SPEC_FILE, STATISTICS_FILE, data_root
from sarjax.errors import UserError, unknown
from sarjax.files import write_atomically
from sarjax.spec import DatasetSpec

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
    options: Options = NO_OPTIONS,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Builds data set `name` from the files in `source` into `out`/name/[config/]version, as TFDS lays it out.

    out: None = $SARJAX_DATA_DIR, else ~/sarjax_data. config: "" = the builder's default. overwrite: replace what is
    there; otherwise a finished build is left alone. jobs: processes that read and encode; the records are the same to
    the byte. options: scenes to leave out, the description of a folder of one's own. progress: called as (stage, done,
    total). say: gets a line or two.
    Returns the folder of the records. Raises UserError for a bad source, an unknown name or an `out` it cannot write.
    """
    cls = builder_class(name)
    source, root = Path(source).expanduser().absolute(), data_root(out).absolute()
    if jobs < 1:
        raise UserError(f"jobs is {jobs}: at least 1 process is needed.")
    _check_source(source)
    layout = cls.layout(source, config, options)
    chosen = cls.tfds_config(config, layout)
    config = getattr(chosen, "name", chosen) or ""
    with _workplace(root, f"{name}-{config}" if config else name) as temporary:
        builder = cls(layout=layout, data_dir=temporary, **({"config": chosen} if chosen else {}))
        final = root / Path(builder.data_dir).relative_to(temporary)
        if (final / STATISTICS_FILE).is_file() and not overwrite:
            _check_same(final, layout.spec)
            say(f"{final} is built already: --overwrite builds it again.")
            return final
        builder.progress, builder.say, builder.jobs = progress, say, jobs
        if layout.notice:
            say(layout.notice)
        _run(builder, source, temporary)
        made = Path(builder.data_dir)
        write_atomically(made / SPEC_FILE, layout.spec.to_json())
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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another build of {name} is running in {root}: wait for it, or use another --out.") from e
        except OSError:
            pass  # a file system without locks
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _check_same(final: Path, spec: DatasetSpec) -> None:
    """UserError where what is built in `final` holds other bands or classes than `spec` says."""
    if (final / SPEC_FILE).read_text(encoding="utf-8") != spec.to_json():
        raise UserError(
            f"{final} holds records of other bands, classes or no-data values than would be built now: --overwrite "
            "builds it again, and another name or --out keeps both."
        )


def _run(builder: Any, source: Path, temporary: Path) -> None:
    import tensorflow_datasets as tfds

    download = tfds.download.DownloadConfig(manual_dir=source, try_download_gcs=False)
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(
            download_dir=temporary / "downloads", download_config=download, file_format="array_record"
        )
    except OSError as e:
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
