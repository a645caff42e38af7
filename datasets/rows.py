"""From a layout to encoded records: which tiles there are, and the records of one row of them.

A row of tiles of one scene, of the scene's full width, is what is read at a time (the originals are stored in strips)
and what one process does at a time, so memory does not grow with the number or the height of scenes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from sarjax import raster
from sarjax.data.imagery import read_image
from sarjax.data.layout import Layout, Scene, drawn_split, read_labels, tile_origins
from sarjax.raster import Window
from sarjax.spec import IGNORE_LABEL, DatasetSpec

SPLITS = ("train", "val", "test")
# Bytes of pixels that are read at a time; only rasters of tens of thousands of columns are read in parts.
ROW_BYTES = 64 << 20


class Compression(NamedTuple):
    """How records are kept small. field: TFDS's encoding of each array. record: array_record's, of a whole record."""

    field: str
    record: str


COMPRESSIONS = {
    # Inflates several times as fast as zlib, and outside of Python, where other threads go on meanwhile.
    "zstd": Compression("bytes", "zstd:1"),
    "zlib": Compression("zlib", "uncompressed"),
    "none": Compression("bytes", "uncompressed"),
}


class Tile(NamedTuple):
    """column: first pixel in the scene. id, name: of the record; ids are unique over all splits."""

    column: int
    id: int
    name: str


class Row(NamedTuple):
    """Tiles of one scene with the same first pixel row `top`, from left to right."""

    scene: Scene
    top: int
    tiles: tuple[Tile, ...]


def plan(layout: Layout, sizes: Sequence[tuple[int, int]]) -> dict[str, list[Row]]:
    """{split: rows} of all tiles of `layout`, whose scenes are of `sizes` (height, width)."""
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    side, first = layout.tile, 0
    most = max(1, ROW_BYTES // (side * side * _bytes_per_pixel(layout.spec)))
    for scene, (height, width) in zip(layout.scenes, sizes, strict=True):
        if scene.tile_id is not None:
            rows[layout.splits[scene.name]].append(Row(scene, 0, (Tile(0, scene.tile_id, scene.name),)))
            continue
        columns = tile_origins(width, side, layout.cover)
        for top in tile_origins(height, side, layout.cover):
            tiles = [Tile(c, first + i, f"{scene.name}/r{top:05d}c{c:05d}") for i, c in enumerate(columns)]
            first += len(tiles)
            for split in SPLITS:
                chosen = [t for t in tiles if _split_of(layout, scene, t) == split]
                rows[split] += [Row(scene, top, tuple(chosen[i : i + most])) for i in range(0, len(chosen), most)]
    return rows


def _split_of(layout: Layout, scene: Scene, tile: Tile) -> str | None:
    return drawn_split(tile.name) if layout.random else layout.splits.get(scene.name)


def _bytes_per_pixel(spec: DatasetSpec) -> int:
    return spec.dates * sum(len(m.bands) * np.dtype(m.dtype).itemsize for m in spec.modalities)


def examples(layout: Layout, row: Row) -> Iterator[dict[str, Any]]:
    """The records of `row` as arrays, as `example` makes them; UserError for a file that does not fit the layout."""
    spec, side, scene = layout.spec, layout.tile, row.scene
    left = row.tiles[0].column
    window = Window(row.top, left, side, row.tiles[-1].column + side - left)
    images, valid = {}, {}
    for m in spec.modalities:
        read = []
        for path in scene.images[m.name]:
            with raster.open_raster(path) as f:
                read.append(read_image(f, m, window))
        images[m.name], valid[m.name] = (np.stack(arrays) for arrays in zip(*read, strict=True))
    label = np.full(window[2:], IGNORE_LABEL, np.uint8)
    if scene.label is not None:
        with raster.open_raster(scene.label) as f:
            label = read_labels(f, layout.labels, window)
    for tile in row.tiles:
        part = slice(tile.column - left, tile.column - left + side)
        cut = {name: image[:, :, part] for name, image in images.items()}
        seen = {name: mask[:, :, part] for name, mask in valid.items()}
        yield example(spec, tile.id, tile.name, cut, seen, label[:, part])


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
        out[m.name] = image if mask.all() else np.where(mask[..., None], image, image.dtype.type(0))
        out[f"{m.name}_valid"] = mask.astype(np.uint8)
        seen |= mask.any(0)
    out["label"] = np.where(seen, label, IGNORE_LABEL).astype(np.uint8)
    return out


def features(spec: DatasetSpec, side: int, compression: str) -> tfds.features.FeaturesDict:
    """What a record of tiles of `side` x `side` pixels holds, as TFDS says it. compression: of `COMPRESSIONS`."""

    def array(shape: tuple[int, ...], dtype: Any) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding=COMPRESSIONS[compression].field)

    found: dict[str, Any] = {"id": np.int32, "name": tfds.features.Text()}
    for m in spec.modalities:
        shape = (spec.dates, side, side, len(m.bands))
        found[m.name] = array(shape, m.dtype)
        found[f"{m.name}_valid"] = array(shape[:3], np.uint8)
    found["label"] = array((side, side), np.uint8)
    return tfds.features.FeaturesDict(found)


class Encoder:
    """(row) -> the bytes of its records, in order."""

    def __init__(self, layout: Layout, compression: str):
        self._layout, self._features = layout, features(layout.spec, layout.tile, compression)
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())

    def __call__(self, row: Row) -> list[bytes]:
        encoded = (self._features.encode_example(e) for e in examples(self._layout, row))
        return [self._serializer.get_tf_example(e).SerializeToString(deterministic=True) for e in encoded]
