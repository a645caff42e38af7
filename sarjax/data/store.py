"""Built records: opening them, and reading tiles by random access.

Reading needs the records, `spec.json` and `stats.json`; neither the builder's code nor rasterio nor TensorFlow.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarjax.errors import UserError, unknown
from sarjax.files import check_is_local
from sarjax.spec import DatasetSpec, Statistics

SPEC_FILE, STATISTICS_FILE, INFO_FILE, FEATURES_FILE = "spec.json", "stats.json", "dataset_info.json", "features.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Split(Sequence):
    """The tiles of one split, in the order of the records: `split[i]` is a dict of arrays in the stored dtype.

    `id` () int32, `m` (t, h, w, c) and `m_valid` (t, h, w) uint8 for each modality m asked for, `label` (h, w) uint8.
    Arrays are read-only. Of modalities that were not asked for no array is made. Safe to read from many threads.
    """

    def __init__(self, builder: Any, name: str, modalities: Sequence[str]):
        import tensorflow_datasets as tfds

        self.split = name
        self.keys = ("id", *(key for m in modalities for key in (m, f"{m}_valid")), "label")
        features = builder.info.features
        # A parser of fewer features skips the others' bytes: that is what TFDS's PartialDecoding does under
        # TensorFlow and its data sources do not.
        self._features = tfds.features.FeaturesDict({key: features[key] for key in self.keys})
        self._name_only = tfds.features.FeaturesDict({"name": features["name"]})
        self._dtypes = {key: features[key].np_dtype for key in self.keys}
        self._shards = [(i.filename, i.take) for i in builder.info.splits[name].file_instructions]
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._source = builder.as_data_source(name, deserialize_method=raw)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        tile = self._parsed(self._features, index)
        return {key: np.asarray(tile[key], self._dtypes[key]) for key in self.keys}

    def name(self, index: int) -> str:
        """The name of tile `index`: for a scene's tile, the scene and where in it."""
        return self._parsed(self._name_only, index)["name"].decode()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tiles; reads every record once."""
        return tuple(self.name(i) for i in range(len(self)))

    def _parsed(self, features: Any, index: Any) -> dict[str, Any]:
        """The `features` of tile `index`; UserError, naming the file, where its bytes are not what was written."""
        i = index.__index__()
        n = len(self._source)
        if not -n <= i < n:
            raise IndexError(f"tile {i} of split {self.split!r}, which has {n}")
        try:
            return features.deserialize_example_np(self._source[i % n])
        except Exception as e:  # the libraries below raise many kinds, bare RuntimeError among them
            raise UserError(f"{self._file(i % n)} is damaged ({_reason(e)}): build the data set again.") from e

    def _file(self, i: int) -> str:
        """The record file that holds tile `i`."""
        for filename, tiles in self._shards:
            if i < tiles:
                return filename
            i -= tiles
        return f"a record file of split {self.split!r}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A built data set. fingerprint: of spec and statistics, which holds the checksum of every record file."""

    spec: DatasetSpec
    statistics: Statistics | None
    directory: Path
    fingerprint: str

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(os.fspath(self.directory))
        except Exception as e:  # TFDS and protobuf raise many kinds for what does not parse
            names = [n for n in (INFO_FILE, FEATURES_FILE) if not _is_object(self.directory / n)]
            what = " and ".join(names) or f"{INFO_FILE} or {FEATURES_FILE}"
            raise UserError(f"{what} in {self.directory} is damaged ({_reason(e)}): build the data set again.") from e

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._builder.info.splits)

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of the tiles in pixels."""
        return self._builder.info.features["label"].shape

    def split(self, name: str, modalities: Sequence[str] | None = None) -> Split:
        """The split `name`, with only `modalities` (None = all); UserError for a name that is not there."""
        if name not in self.splits:
            raise unknown(f"split of {self.spec.name}", name, self.splits)
        for m in modalities or ():
            if m not in self.spec.modality_names:
                raise unknown(f"modality of {self.spec.name}", m, self.spec.modality_names)
        try:
            split = Split(self._builder, name, self.spec.modality_names if modalities is None else modalities)
        except KeyError as e:
            raise UserError(f"{self.directory / FEATURES_FILE} has no feature {e}: build the data set again.") from e
        if self.statistics is not None and len(split) != self.statistics.tiles.get(name):
            raise UserError(
                f"{INFO_FILE} in {self.directory} counts {len(split)} tiles in split {name!r}, but {STATISTICS_FILE} "
                f"{self.statistics.tiles.get(name, 0)}: build the data set again."
            )
        return split


def data_root(data_dir: str | os.PathLike | None = None) -> Path:
    """Where built data sets are: `data_dir`, else $SARJAX_DATA_DIR, else ~/sarjax_data. UserError for a bucket."""
    root = data_dir or os.environ.get("SARJAX_DATA_DIR") or "~/sarjax_data"
    check_is_local(root, "records are read by random access; build in a folder, and copy from a bucket into one first")
    return Path(root).expanduser()


def open_dataset(name: str, config: str = "", data_dir: str | os.PathLike | None = None) -> Dataset:
    """The newest version of the built data set `name` under `data_root(data_dir)`.

    config: "" = the builder's default. Raises UserError, saying what is there and how to build it, if it is not.
    """
    directory = find(name, config, data_dir)
    if directory is None:
        root, option = data_root(data_dir), f" --config {config}" if config else ""
        there = ", ".join(available(root)) or "nothing"
        raise UserError(
            f"no data set {name!r}{f' ({config})' if config else ''} in {root}, where there is {there}: build it with "
            f"`sarjax data build {name}{option} --source DIR --out {root}`."
        )
    return open_directory(directory)


def open_directory(path: str | os.PathLike, need_statistics: bool = True) -> Dataset:
    """The data set whose records lie in `path`; UserError if that is not such a folder.

    need_statistics: False leaves `stats.json` unread, to make it.
    """
    path = Path(path).absolute()
    for name in (INFO_FILE, SPEC_FILE):
        if not (path / name).is_file():
            raise UserError(
                f"{path} holds no built data set ({name} is missing): make one with "
                "`sarjax data build NAME --source DIR`."
            )
    texts, spec = _parsed_file(path / SPEC_FILE, DatasetSpec.from_json)
    statistics = None
    if need_statistics and (path / STATISTICS_FILE).is_file():
        text, statistics = _parsed_file(path / STATISTICS_FILE, Statistics.from_json)
        texts += f"\0{text}"
    if need_statistics:
        if statistics is None:
            raise UserError(f"{path} has no {STATISTICS_FILE}: make it with `sarjax data stats {path}`.")
        missing = [name for name in statistics.records if not (path / name).is_file()]
        if missing:
            raise UserError(f"{path / missing[0]} is missing: build the data set again, or copy all of its files.")
    fingerprint = hashlib.sha256(texts.encode()).hexdigest()[:16]
    return Dataset(spec, statistics, path, fingerprint)


def _parsed_file(path: Path, parse: Callable[[str], Any]) -> tuple[str, Any]:
    """(text, what `parse` makes of it); UserError, naming the file, where it makes nothing."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, parse(text)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({_reason(e)}): build the data set again.") from e


def _is_object(path: Path) -> bool:
    """Whether `path` holds a JSON object with anything in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content)


def _reason(e: Exception) -> str:
    """The first line of what an exception says, for the middle of a sentence."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")[:200]


def find(name: str, config: str = "", data_dir: str | os.PathLike | None = None) -> Path | None:
    """The folder of the newest version of a built data set, or None."""
    folder = data_root(data_dir) / name
    default = folder / ".config" / "metadata.json"
    if not config and default.is_file():
        config = _parsed_file(default, lambda text: json.loads(text)["default_config_name"])[1]
    folder = folder / config if config else folder
    versions = [p for p in folder.iterdir() if _is_built(p)] if folder.is_dir() else []
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def available(root: Path) -> list[str]:
    """Names of the built data sets under `root`, with their configuration where they have one."""
    built = [p for pattern in ("[!.]*/*", "[!.]*/*/*") for p in root.glob(pattern) if _is_built(p)]
    return sorted({p.parent.relative_to(root).as_posix() for p in built})


def _is_built(path: Path) -> bool:
    return bool(_VERSION.fullmatch(path.name)) and (path / INFO_FILE).is_file()
