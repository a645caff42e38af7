"""The rasters of a map while they are being written, and threads in which rasters are opened and closed."""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarjax import raster
from sarjax.raster import Window
from sarjax.scenes.inputs import SceneReader
from sarjax.spec import IGNORE_LABEL, DatasetSpec


class Worker:
    """One thread, and what is opened in it: a raster is not shared between threads, and is closed where it began.

    closing: entered while what was opened is closed.
    """

    def __init__(self, name: str, closing: contextlib.AbstractContextManager | None = None):
        self._pool, self._stack = ThreadPoolExecutor(1, name), contextlib.ExitStack()
        self._closing = closing or contextlib.nullcontext()

    def submit(self, work: Callable, *args: Any) -> Future:
        return self._pool.submit(work, *args)

    def open(self, manager: contextlib.AbstractContextManager) -> Any:
        return self.submit(self._stack.enter_context, manager).result()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *raised: Any) -> None:
        # Rasters that are being written must see what went wrong, so that none of them appears half-written.
        try:
            with self._closing:
                self.submit(self._stack.__exit__, *raised).result()
        finally:
            self._pool.shutdown()


class Mapped(NamedTuple):
    """What a map holds: pixels of each class, and pixels without data."""

    classes: tuple[int, ...]
    no_data: int

    @classmethod
    def counted(cls, found: np.ndarray, num_classes: int) -> "Mapped":
        """Of how often each value of the map occurs, (256,)."""
        return cls(tuple(int(n) for n in found[:num_classes]), int(found[IGNORE_LABEL]))


class MapFiles:
    """The open map, one uint8 band in the data set's palette, and, or None, the open probabilities.

    255 is no-data: nothing was seen there by any sensor; NaN in the probabilities, a float32 band per class.
    """

    def __init__(self, labels: raster.Writer, probabilities: raster.Writer | None):
        self._labels, self._probabilities = labels, probabilities

    def write(self, part: Window, labels: np.ndarray, values: np.ndarray | None, seen: np.ndarray) -> np.ndarray:
        """Writes a part of the scene; how often each value of the map occurs in it, (256,).

        labels: (h, w) classes. values: (h, w, k) probabilities, not read where none are asked for. seen: (h, w) bool.
        """
        found = np.where(seen, labels, IGNORE_LABEL).astype(np.uint8)
        self._labels.write(part, found)
        if self._probabilities is not None:
            self._probabilities.write(part, np.where(seen[..., None], values, np.float32(np.nan)))
        return np.bincount(found.ravel(), minlength=256)


def create_map(
    writer: Worker,
    source: SceneReader,
    labels: Path,
    probabilities: Path | None,
    spec: DatasetSpec,
    tags: Mapping[str, str] | None,
) -> MapFiles:
    """The rasters of the map of `source`, where it lies; they appear, whole, when `writer` ends."""
    size, place, tags = (source.height, source.width), source.georeference, dict(tags or {})
    classes = writer.open(
        raster.create(
            labels, *size, 1, "uint8", georeference=place, no_data=IGNORE_LABEL, palette=spec.palette, tags=tags,
            descriptions=("class",),
        )
    )  # fmt: skip
    if probabilities is None:
        return MapFiles(classes, None)
    k, names = spec.num_classes, spec.class_names
    shares = writer.open(
        raster.create(
            probabilities, *size, k, "float32", georeference=place, no_data=np.nan, descriptions=names, tags=tags
        )
    )
    return MapFiles(classes, shares)
