"""What is in the files of one scene: every pixel decoded once, side by side, window by window, and counted.

Memory does not grow with the scene. A file that cannot be read to its end stops no other.
"""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sarjax import raster
from sarjax.data.imagery import read_image
from sarjax.data.layout import Layout, Scene, WaterCheck, tile_origins
from sarjax.errors import UserError
from sarjax.raster import Reader, Window
from sarjax.spec import IGNORE_LABEL

# Numbers in a window of one file: what bounds the memory.
WINDOW_VALUES = 2**23


@dataclasses.dataclass
class Tally:
    """The counts of one scene, of its whole files only.

    broken: {file: why it could not be read to its end}. pixels, valid: {image file: pixels, those with data}.
    labels: {value in the label file: pixels}. empty: tiles in which no sensor saw anything (0 unless all images are
    whole and of one size). water: (dates, 2, 2) sum of NDWI and number of pixels, elsewhere and on water.
    """

    water: np.ndarray
    broken: dict[Path, str] = dataclasses.field(default_factory=dict)
    pixels: Counter[Path] = dataclasses.field(default_factory=Counter)
    valid: Counter[Path] = dataclasses.field(default_factory=Counter)
    labels: Counter[int] = dataclasses.field(default_factory=Counter)
    empty: int = 0


def tally(scene: Scene, layout: Layout, opaque: frozenset[Path] = frozenset()) -> Tally:
    """Reads and counts the files of a scene.

    opaque: files whose bands or dtype are not those of the description: they are decoded, but mean nothing. A file that
    cannot be opened is left out: its header has been found wrong already.
    """
    counts = Tally(np.zeros((layout.spec.dates, 2, 2)))
    with contextlib.ExitStack() as stack:
        by_size: dict[tuple[int, int], dict[Path, Reader]] = defaultdict(dict)
        for path in scene.files:
            with contextlib.suppress(UserError):
                reader = stack.enter_context(raster.open_raster(path))
                by_size[reader.info[:2]][path] = reader
        for (height, width), readers in by_size.items():
            bands = max(reader.info.bands for reader in readers.values())
            for rows, columns in windows(height, width, layout.tile, layout.cover, bands):
                _count(counts, scene, layout, readers, opaque, rows, columns)
    _forget_broken(counts, scene, layout)
    return counts


class Span(NamedTuple):
    """Pixels [start, stop) of an axis and the first pixels of its tiles; those before `fresh` were in one before."""

    start: int
    stop: int
    fresh: int
    origins: Sequence[int]


def spans(length: int, tile: int, cover: bool, most: int) -> list[Span]:
    """Cuts an axis of `length` pixels into spans of at most `most` tiles, remainders too; each pixel is fresh once."""
    origins = tile_origins(length, tile, cover) if length >= tile else []
    out, done = [], 0
    for i in range(0, len(origins), most):
        part = origins[i : i + most]
        out.append(Span(part[0], part[-1] + tile, done, part))
        done = part[-1] + tile
    rest = range(done, length, tile * most)
    return out + [Span(start, min(start + tile * most, length), start, ()) for start in rest]


def windows(height: int, width: int, tile: int, cover: bool, bands: int) -> Iterator[tuple[Span, Span]]:
    """(rows, columns) of windows over an image, each of `WINDOW_VALUES` numbers or one tile, as wide as may be."""
    across = max(1, WINDOW_VALUES // (tile * tile * bands))
    down = max(1, WINDOW_VALUES // (tile * min(width, across * tile) * bands))
    for rows in spans(height, tile, cover, down):
        for columns in spans(width, tile, cover, across):
            yield rows, columns


def ndwi(image: np.ndarray, check: WaterCheck) -> np.ndarray:
    """(h, w) float32 (green - nir) / (green + nir) of an image (h, w, c); NaN where their sum is not positive."""
    green, nir = (image[..., band].astype(np.float32) for band in (check.green, check.nir))
    total = green + nir
    return np.divide(green - nir, total, out=np.full_like(total, np.nan), where=total > 0)


def _count(
    counts: Tally,
    scene: Scene,
    layout: Layout,
    readers: Mapping[Path, Reader],
    opaque: frozenset[Path],
    rows: Span,
    columns: Span,
) -> None:
    """Adds one window of files of one size to `counts`."""
    window = Window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    fresh = slice(rows.fresh - rows.start, None), slice(columns.fresh - columns.start, None)
    modality = {path: m for m in layout.spec.modalities for path in scene.images[m.name]}
    images, valid, label = {}, {}, None
    for path, reader in readers.items():
        if path in counts.broken:
            continue
        try:
            if path in opaque:
                reader.read(window)
            elif path in modality:
                images[path], valid[path] = read_image(reader, modality[path], window)
            else:
                label = reader.read(window)[..., 0]
        except UserError as e:
            counts.broken[path] = str(e)
    for path, mask in valid.items():
        counts.pixels[path] += mask[fresh].size
        counts.valid[path] += int(np.count_nonzero(mask[fresh]))
    if label is not None:
        counts.labels.update(_values(label[fresh]))
    if len(valid) == len(modality):
        seen = np.logical_or.reduce(list(valid.values()))
        for row in (r - rows.start for r in rows.origins):
            for column in (c - columns.start for c in columns.origins):
                counts.empty += not seen[row : row + layout.tile, column : column + layout.tile].any()
    if layout.water and label is not None:
        known = [value for value, index in layout.labels.items() if index not in (layout.water.water, IGNORE_LABEL)]
        wet = [value for value, index in layout.labels.items() if index == layout.water.water]
        groups = [np.isin(label[fresh], values) for values in (known, wet)]
        for date, path in enumerate(scene.images[layout.water.modality]):
            if path in images:
                index = ndwi(images[path][fresh], layout.water)
                for i, group in enumerate(groups):
                    chosen = index[group & ~np.isnan(index)]  # pixels without data are 0
                    counts.water[date, i] += chosen.sum(dtype=np.float64), chosen.size


def _values(label: np.ndarray) -> dict[int, int]:
    """{value: pixels} of whole numbers (h, w)."""
    if label.dtype in (np.uint8, np.uint16):
        pixels = np.bincount(label.ravel())
        return {int(v): int(pixels[v]) for v in np.flatnonzero(pixels)}
    values, pixels = np.unique(label, return_counts=True)
    return {int(v): int(n) for v, n in zip(values, pixels, strict=True)}


def _forget_broken(counts: Tally, scene: Scene, layout: Layout) -> None:
    """Half a file says nothing of the whole."""
    for path in counts.broken:
        counts.pixels.pop(path, None)
        counts.valid.pop(path, None)
        if path == scene.label:
            counts.labels.clear()
            counts.water[:] = 0
        else:
            counts.empty = 0
        if layout.water and path in scene.images[layout.water.modality]:
            counts.water[scene.images[layout.water.modality].index(path)] = 0
