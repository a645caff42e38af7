"""What the builders share: from a layout to TFDS record files, in order, in little memory, the same to the byte.

A data set is one folder here with `<name>_dataset_builder.py` holding a `Builder(builder.Builder)` that says how its
files lie: `layout`. What is read, cut, checked and written follows from that.
"""

import abc
import contextlib
import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from sarjax_datasets import rows, workers

from sarjax import raster
from sarjax.data.layout import NO_OPTIONS, Layout, Options, Problem, check_scene, off_scale
from sarjax.errors import UserError, unknown
from sarjax.spec import DatasetSpec

SHARD_BYTES = 256 << 20
SAID = 10

example = rows.example


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder whose records are a pure function of the source files.

    progress: called as (stage, done, total) while building: by scene in "files", by row of tiles in each split.
    say: gets a line for each warning. jobs: processes that read and encode. compression: of `rows.COMPRESSIONS`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Whether the first configuration is what is opened where none is named.
    HAS_DEFAULT = True
    progress: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = staticmethod(lambda line: None)
    jobs: int = 1

    def __init__(self, *, layout: Layout, compression: str = "zstd", **kwargs: Any):
        self.on_disk, self.compression = layout, compression  # before TFDS asks for `_info`
        super().__init__(**kwargs)

    @classmethod
    @abc.abstractmethod
    def layout(cls, source: Path, config: str = "", options: Options = NO_OPTIONS) -> Layout:
        """How the data set lies in the folder `source`, by listing it.

        What is wrong with the files is in `Layout.problems`. config: "" = the default. UserError for a configuration
        that is not there and for options that name nothing.
        """

    @classmethod
    def declared(cls, config: str = "") -> tuple[DatasetSpec, int] | None:
        """(spec, side of the tiles) that records of a configuration will have; None where only the files say it."""
        return None

    @classmethod
    def tfds_config(cls, config: str, layout: Layout) -> Any:
        """What TFDS calls the configuration `config`, whose layout is `layout`; None where there are none."""
        return known_config(cls, config) or None

    def _info(self) -> tfds.core.DatasetInfo:
        features = rows.features(self.on_disk.spec, self.on_disk.tile, self.compression)
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def plan(self) -> dict[str, list[rows.Row]]:
        """{split: rows of tiles}, after a look at the header of every file; UserError for the first fatal problem."""
        layout, sizes, warnings = self.on_disk, [], _warnings(self.on_disk.problems)
        if not layout.random:
            built = tuple(scene for scene in layout.scenes if scene.name in layout.splits)
            layout = dataclasses.replace(layout, scenes=built)
        for done, scene in enumerate(layout.scenes):
            self._report("files", done, len(layout.scenes))
            size, problems = check_scene(scene, layout.spec, layout.tile)
            warnings += _warnings(problems)
            sizes.append(size)
        self._report("files", len(layout.scenes), len(layout.scenes))
        for problem in warnings[:SAID]:
            self.say(problem.text)
        if len(warnings) > SAID:
            self.say(f"and {len(warnings) - SAID} more warnings, which `sarjax data check` shows.")
        _warnings(off_scale(layout, lambda scene: _highest(scene.label, layout.tile)))
        plan = rows.plan(layout, sizes)
        if not plan["train"]:
            raise UserError(f"the train split of {layout.spec.name} is empty: add training data, or leave out less.")
        return {split: jobs for split, jobs in plan.items() if jobs}

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise NotImplementedError  # TFDS wants the two; `_generate_splits`, which would call them, is ours

    _generate_examples = _split_generators

    def _log_download_bytes(self) -> None:
        """Says nothing: there is no download."""

    def _log_download_done(self) -> None:
        """Says nothing: the records are not where they will be yet."""

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[tfds.core.SplitInfo]:
        # TFDS's own writer keeps up to 1 GB in memory, then opens a thousand temporary files, and its protocol
        # buffers come out in another byte order in every process. This one writes each record as it comes.
        plan = self.plan()
        every = list(itertools.chain.from_iterable(plan.values()))
        jobs, folder = min(self.jobs, len(every)), Path(self.data_dir)
        with contextlib.closing(workers.encode(self.on_disk, self.compression, every, jobs, folder)) as records:
            return [self._write(split, itertools.islice(records, len(n)), len(n)) for split, n in plan.items()]

    def _write(self, split: str, records: Iterable[list[bytes]], total: int) -> tfds.core.SplitInfo:
        """Writes the records of a split, which come by row; total: the number of rows."""
        template = self._get_filename_template(split_name=split)
        folder = Path(template.data_dir)
        lengths: list[int] = []
        size = in_shard = 0
        writer = None
        try:
            for record in self._counted(split, records, total):
                if writer is None or in_shard + len(record) > SHARD_BYTES:
                    if writer:
                        writer.close()
                    writer = _Shard(folder / f"{split}-{len(lengths)}.part", self.compression)
                    lengths.append(0)
                    in_shard = 0
                writer.write(record)
                lengths[-1] += 1
                in_shard += len(record)
                size += len(record)
            if writer:
                writer.close()
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what is said
                if writer:
                    writer.close()
            raise
        for i in range(len(lengths)):
            final = template.sharded_filepath(shard_index=i, num_shards=len(lengths))
            (folder / f"{split}-{i}.part").rename(final)
        return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)

    def _counted(self, split: str, records: Iterable[list[bytes]], total: int) -> Iterator[bytes]:
        self._report(split, 0, total)
        for done, row in enumerate(records):
            yield from row
            self._report(split, done + 1, total)


class _Shard:
    """A file of records; OSError, as of other files, where the library raises a bare RuntimeError."""

    def __init__(self, path: Path, compression: str):
        # Groups of one: a record is read without its neighbours.
        with _as_os_error():
            self._writer = ArrayRecordWriter(str(path), f"group_size:1,{rows.COMPRESSIONS[compression].record}")

    def write(self, record: bytes) -> None:
        with _as_os_error():
            self._writer.write(record)

    def close(self) -> None:
        with _as_os_error():
            self._writer.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        codes = (code for code in (errno.ENOSPC, errno.EDQUOT) if os.strerror(code) in str(e))
        raise OSError(next(codes, errno.EIO), str(e).splitlines()[0].rstrip(".")) from e


def known_config(cls: type[Builder], config: str) -> str:
    """The name of the configuration `config`, "" = the default; UserError, with the nearest, for an unknown one."""
    names = [c.name for c in cls.BUILDER_CONFIGS]
    if config and config not in names:
        raise unknown(f"configuration of {cls.name}", config, names)
    return config or (names[0] if names else "")


def _highest(label: Path, rows: int) -> int:
    """The largest value in a label file, which is read `rows` rows at a time."""
    with raster.open_raster(label) as f:
        height, width = f.info[:2]
        return max(int(f.read((top, 0, min(rows, height - top), width)).max()) for top in range(0, height, rows))


def _warnings(problems: Iterable[Problem]) -> list[Problem]:
    """The warnings; UserError for the first fatal problem."""
    found = []
    for problem in problems:
        if problem.severity == "fatal":
            raise UserError(problem.text)
        found.append(problem)
    return found
