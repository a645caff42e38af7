"""What the builders share: from a plan of jobs to TFDS record files, in order, in little memory, the same to the byte.

A data set is one folder here with `<name>_dataset_builder.py` holding a `Builder(builder.Builder)` that says three
things: `spec_of`, what the data set holds; `plan`, which jobs make up each split; `examples`, the tiles of one job.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer

from sarjax.errors import UserError
from sarjax.spec import IGNORE_LABEL, DatasetSpec

SHARD_BYTES = 256 << 20


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder whose records are a pure function of the source files.

    progress: called as (split, jobs done, jobs in all) while building.
    """

    VERSION = tfds.core.Version("1.0.0")
    progress: Callable[[str, int, int], None] | None = None

    @classmethod
    def spec_of(cls, config: str = "") -> DatasetSpec:
        """The spec of the records that `config` ("" = the default) builds."""
        raise NotImplementedError

    @property
    def spec(self) -> DatasetSpec:
        return self.spec_of(self.builder_config.name if self.builder_config else "")

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return 256

    def plan(self, source: Path) -> Mapping[str, Sequence[Any]]:
        """{split: jobs} from the files under `source`, read no further than needed; UserError for a bad source."""
        raise NotImplementedError

    def notice(self, source: Path) -> str:
        """A line for the user: what the files under `source` hold that this configuration does not read ("" = none)."""
        return ""

    def examples(self, job: Any) -> Iterator[dict[str, Any]]:
        """The tiles of one job, as `example` makes them."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        side, spec = self.tile, self.spec
        features: dict[str, Any] = {"id": np.int32, "name": tfds.features.Text()}
        for m in spec.modalities:
            shape = (spec.dates, side, side, len(m.bands))
            features[m.name] = tfds.features.Tensor(shape=shape, dtype=np.dtype(m.dtype), encoding="zlib")
            features[f"{m.name}_valid"] = tfds.features.Tensor(shape=shape[:3], dtype=np.uint8, encoding="zlib")
        features["label"] = tfds.features.Tensor(shape=(side, side), dtype=np.uint8, encoding="zlib")
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        source = Path(dl_manager.manual_dir)
        plan = self.plan(source)
        if not plan["train"]:
            raise UserError(f"{source} holds nothing for the train split, only for others: add training data.")
        return {split: self._generate_examples(split, jobs) for split, jobs in plan.items() if jobs}

    def _generate_examples(self, split: str, jobs: Sequence[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        for done, job in enumerate(jobs):
            if self.progress:
                self.progress(split, done, len(jobs))
            for example in self.examples(job):
                yield int(example["id"]), example
        if self.progress:
            self.progress(split, len(jobs), len(jobs))

    def _log_download_bytes(self) -> None:
        """Says nothing: there is no download."""

    def _log_download_done(self) -> None:
        """Says nothing: the records are not where they will be yet."""

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[tfds.core.SplitInfo]:
        # TFDS's own writer keeps up to 1 GB in memory, then opens a thousand temporary files, and its protocol
        # buffers come out in another byte order in every process. This one writes each record as it comes.
        generators = self._split_generators(dl_manager)
        return [self._write(split, generator) for split, generator in generators.items()]

    def _write(self, split: str, generator: Iterator[tuple[int, dict[str, Any]]]) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split_name=split)
        serializer = example_serializer.ExampleSerializer(self.info.features.get_serialized_info())
        folder = Path(template.data_dir)
        lengths: list[int] = []
        total = in_shard = 0
        writer = None
        try:
            for _, example in generator:
                encoded = self.info.features.encode_example(example)
                record = serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
                if writer is None or in_shard + len(record) > SHARD_BYTES:
                    if writer:
                        writer.close()
                    # Fields are compressed already: a second compression costs time and gains nothing.
                    writer = ArrayRecordWriter(
                        str(folder / f"{split}-{len(lengths)}.part"), "group_size:1,uncompressed"
                    )
                    lengths.append(0)
                    in_shard = 0
                writer.write(record)
                lengths[-1] += 1
                in_shard += len(record)
                total += len(record)
        finally:
            if writer:
                writer.close()
        for i in range(len(lengths)):
            final = template.sharded_filepath(shard_index=i, num_shards=len(lengths))
            (folder / f"{split}-{i}.part").rename(final)
        return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=total, filename_template=template)


def example(
    spec: DatasetSpec,
    tile_id: int,
    name: str,
    images: Mapping[str, np.ndarray],
    valid: Mapping[str, np.ndarray],
    label: np.ndarray,
) -> dict[str, Any]:
    """One record by the house rules: no-data is 0, and what no input sees is ignored.

    images: {modality: (t, h, w, c) stored dtype}. valid: {modality: (t, h, w) bool}. label: (h, w) uint8, 255 = ignore.
    A NaN makes its pixel invalid; a pixel that is invalid in every modality and date gets label 255.
    """
    out: dict[str, Any] = {"id": np.int32(tile_id), "name": name}
    seen = np.zeros(label.shape, bool)
    for m in spec.modalities:
        image, mask = images[m.name], valid[m.name]
        if image.dtype.kind == "f":
            mask = mask & ~np.isnan(image).any(-1)
        out[m.name] = np.where(mask[..., None], image, image.dtype.type(0))
        out[f"{m.name}_valid"] = mask.astype(np.uint8)
        seen |= mask.any(0)
    out["label"] = np.where(seen, label, IGNORE_LABEL).astype(np.uint8)
    return out
