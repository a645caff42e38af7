"""Statistics of a built data set: one streaming pass over the training split, and a checksum of every record file.

Integer bands are summed exactly, so that the same records give the same `stats.json`, and so the same fingerprint,
on every machine; float bands are merged tile by tile in float64.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sarjax.data.store import STATISTICS_FILE, Dataset, open_directory
from sarjax.files import file_digest, write_atomically
from sarjax.spec import BandStatistics, Statistics


class Moments:
    """Running count, mean, spread and range per band of valid pixels."""

    def __init__(self, bands: int):
        self.count = 0
        self.minimum = np.full(bands, np.inf)
        self.maximum = np.full(bands, -np.inf)
        self._sum = [0] * bands  # exact integers
        self._squares = [0] * bands
        self._mean = np.zeros(bands)
        self._m2 = np.zeros(bands)

    def add(self, pixels: np.ndarray) -> None:
        """Adds pixels (n, c) of an integer or float dtype."""
        n = len(pixels)
        if not n:
            return
        # Band by band: along the first of two axes, the other being this short, reductions take many times as long.
        bands = [np.ascontiguousarray(band) for band in pixels.T]
        self.minimum = np.minimum(self.minimum, [band.min() for band in bands])
        self.maximum = np.maximum(self.maximum, [band.max() for band in bands])
        if pixels.dtype.kind in "iu":
            wide = [band.astype(np.int64) for band in bands]
            self._sum = [a + int(b.sum()) for a, b in zip(self._sum, wide, strict=True)]
            self._squares = [a + int(b @ b) for a, b in zip(self._squares, wide, strict=True)]
        else:
            # Chan et al. 1979: the sum of squares would cancel for a band far from 0.
            wide = pixels.astype(np.float64)
            mean = wide.mean(0)
            delta, total = mean - self._mean, self.count + n
            self._m2 += ((wide - mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
            self._mean += delta * (n / total)
        self.count += n

    def result(self) -> BandStatistics:
        n = max(self.count, 1)
        if any(self._squares):
            mean = [s / n for s in self._sum]
            std = [math.sqrt(n * q - s * s) / n for s, q in zip(self._sum, self._squares, strict=True)]
        else:
            mean, std = self._mean.tolist(), np.sqrt(self._m2 / n).tolist()
        low, high = (np.where(np.isfinite(x), x, 0.0).tolist() for x in (self.minimum, self.maximum))
        return BandStatistics(tuple(mean), tuple(std), tuple(low), tuple(high), self.count)


def compute(dataset: Dataset, progress: Callable[[str, int, int], None] | None = None) -> Statistics:
    """The statistics of `dataset`: bands and classes of its train split, tiles and checksums of all splits."""
    spec = dataset.spec
    if "train" not in dataset.splits:
        raise UserError(f"{dataset.directory} has no train split, only {', '.join(dataset.splits) or 'none'}.")
    moments = {m.name: Moments(len(m.bands)) for m in spec.modalities}
    classes = np.zeros(256, np.int64)
    train = dataset.split("train")
    for i, tile in enumerate(train):
        for name, m in moments.items():
            valid = tile[f"{name}_valid"] > 0
            m.add(tile[name].reshape(-1, len(m.minimum)) if valid.all() else tile[name][valid])
        classes += np.bincount(tile["label"].ravel(), minlength=256)
        if progress:
            progress("statistics", i + 1, len(train))
    return Statistics(
        bands={name: m.result() for name, m in moments.items()},
        class_pixels=tuple(int(n) for n in classes[: spec.num_classes]),
        tiles={name: len(dataset.split(name)) for name in dataset.splits},
        records={path.name: file_digest(path)[1] for path in record_files(dataset.directory)},
    )


def write(directory: str | os.PathLike, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Computes the statistics of the records in `directory` and replaces its stats.json, in one move; its path.

    `sarjax data stats DIR`. Raises UserError if `directory` holds no records or may not be written to.
    """
    dataset = open_directory(directory, need_statistics=False)
    write_atomically(dataset.directory / STATISTICS_FILE, compute(dataset, progress).to_json())
    return dataset.directory / STATISTICS_FILE


def record_files(directory: Path) -> list[Path]:
    """The record shards in `directory`, sorted by name."""
    return sorted(directory.glob("*.array_record-*"))
