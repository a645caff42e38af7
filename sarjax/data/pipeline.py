"""From records to numpy batches: which tile is row r of step s, for any number of processes, from any step on.

A batch is a function of (seed, step, tables) alone. Row r of step s of a stream is `order[s * rows + r]`, where
`order` strings shuffled passes over the stream's tiles together; process p of P reads rows
[p rows / P, (p + 1) rows / P). So the global batch is the same, row for row, however many processes read it, and a
run resumes at any step without reading what came before.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from sarjax.errors import UserError
from sarjax.spec import IGNORE_LABEL, Stream

ALIGNMENT = 64  # bytes

Tile = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]


def _generator(seed: int, name: str, *position: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *position])


def labelled_split(tiles: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of labelled and of unlabelled tiles, each sorted.

    The lists of a seed are nested: what is labelled at a share is labelled at every larger one. At least one tile is
    labelled, so that a run on few tiles has something to learn from.
    """
    if not 0 < share <= 1:
        raise UserError(f"experiment.data.labelled is {share}; a share above 0 and up to 1 is accepted.")
    order = _generator(seed, "labelled").permutation(tiles)
    count = max(1, round(share * tiles))
    return np.sort(order[:count]), np.sort(order[count:])


class Order:
    """`order[q]`: the tile at global position q of an endless string of shuffled passes over `pool`."""

    def __init__(self, pool: np.ndarray, seed: int, stream: str):
        self._pool, self._seed, self._stream = np.asarray(pool), seed, stream
        self._passes: dict[int, np.ndarray] = {}

    def _pass(self, index: int) -> np.ndarray:
        shuffled = self._passes.get(index)
        if shuffled is None:
            shuffled = _generator(self._seed, self._stream, index).permutation(self._pool)
            # Replaced, not changed: several threads read ahead.
            self._passes = {k: v for k, v in self._passes.items() if k >= index - 2} | {index: shuffled}
        return shuffled

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return np.array([self._pass(int(q) // len(self._pool))[int(q) % len(self._pool)] for q in positions])


class Batches:
    """The training batches of one process: `batches[step] -> {stream: plain dict of arrays}`.

    Beside what a tile holds, `row` (b,) is the index in the global batch and `position` (b,) that in `tiles`.

    tiles: the training split, a random-access sequence of {key: array}. streams: what a batch is made of.
    batch_size: rows of a stream whose share is 1, over all processes. tables: {name: (n, k) int array} of partners for
    "follow" streams, positions in `tiles`, -1 = none.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        streams: Mapping[str, Stream],
        *,
        batch_size: int,
        seed: int,
        labelled: float = 1.0,
        labelled_seed: int = 0,
        process: int = 0,
        processes: int = 1,
        tables: Mapping[str, np.ndarray] | None = None,
    ):
        self.tiles, self.streams, self.seed, self.tables = tiles, streams, seed, dict(tables or {})
        with_labels, without = labelled_split(len(tiles), labelled, labelled_seed)
        self.rows = {name: round(stream.rows * batch_size) for name, stream in streams.items()}
        self._orders: dict[str, Order] = {}
        self._local: dict[str, np.ndarray] = {}
        for name, stream in streams.items():
            rows = self.rows[name]
            if rows < 1 or rows % processes:
                raise UserError(
                    f"stream {name!r} has {rows} rows in a batch of {batch_size}, which {processes} processes cannot "
                    f"share equally; a multiple of {processes} is accepted."
                )
            self._local[name] = np.arange(process * rows // processes, (process + 1) * rows // processes)
            pool = {"labelled": with_labels, "unlabelled": without}.get(stream.kind)
            if pool is not None:
                if not len(pool):
                    raise UserError(
                        f"stream {name!r} needs {stream.kind} tiles, but experiment.data.labelled = {labelled} "
                        f"leaves none of {len(tiles)}; a share below 1 is accepted."
                    )
                self._orders[name] = Order(pool, seed, name)
            elif stream.follows not in streams or streams[stream.follows].kind == "follow":
                raise ValueError(f"stream {name!r} follows {stream.follows!r}, which draws no tiles of its own")

    def indices(self, step: int, name: str) -> np.ndarray:
        """Positions in `tiles` of the local rows of stream `name` at `step`."""
        stream, rows, local = self.streams[name], self.rows[name], self._local[name]
        if stream.kind != "follow":
            return self._orders[name][step * rows + local]
        leader = self.indices(step, stream.follows)
        partners = np.concatenate([leader[:, None], self.tables[stream.table][leader]], axis=1)
        # Drawn for the whole batch and then cut, so that the draw does not depend on the number of processes.
        drawn = _generator(self.seed, name, step).random(rows)[local]
        count = (partners >= 0).sum(axis=1)
        kept = np.take_along_axis(partners, np.argsort(partners < 0, axis=1, kind="stable"), axis=1)
        return kept[np.arange(len(leader)), np.minimum((drawn * count).astype(int), count - 1)]

    def __getitem__(self, step: int) -> dict[str, Batch]:
        batch = {}
        for name, stream in self.streams.items():
            positions = self.indices(step, name)
            batch[name] = _stack((self.tiles[int(i)] for i in positions), self._local[name])
            batch[name]["position"] = positions.astype(np.int32)
            if stream.kind == "unlabelled":
                batch[name]["hidden_label"] = batch[name]["label"]
                batch[name]["label"] = np.full_like(batch[name]["label"], IGNORE_LABEL)
        return batch

    def iterate(self, start: int, stop: int, prefetch: int = 2) -> Iterator[dict[str, Batch]]:
        """Batches of steps start..stop-1, read ahead by `prefetch` threads; closing the iterator drains them."""
        import grain  # importing grain imports jax

        class Steps:
            def __len__(_):
                return max(0, stop - start)

            def __getitem__(_, i):
                return self[start + int(i)]

        options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=max(prefetch, 1))
        return iter(grain.MapDataset.source(Steps()).to_iter_dataset(options))


def evaluation_batches(
    tiles: Sequence[Tile], batch_size: int, *, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """All tiles in order, as plain batches of equal size; rows that fill up the last one have `row_valid` 0."""
    local = range(process * batch_size // processes, (process + 1) * batch_size // processes)
    for first in range(0, len(tiles), batch_size):
        positions = [first + r for r in local]
        batch = _stack((tiles[min(q, len(tiles) - 1)] for q in positions), np.asarray(positions))
        padding = np.asarray(positions) >= len(tiles)
        batch["row_valid"][padding] = 0
        batch["label"][padding] = IGNORE_LABEL
        batch["id"][padding] = -1
        yield batch


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` that begins at a multiple of 64 bytes: a CPU device then takes the memory itself and makes no copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _stack(rows: Iterable[Tile], positions: np.ndarray) -> Batch:
    """`rows` as one batch. Each is copied to its place before the next is decoded, so that the memory of a tile is used
    again at once: what the allocator gives back to the system and takes anew, page by page, costs more than decoding.
    """
    batch: Batch = {}
    for i, row in enumerate(rows):
        for key, value in row.items():
            if not i:
                batch[key] = _aligned((len(positions), *np.shape(value)), np.asarray(value).dtype)
            batch[key][i] = value
    batch["id"] = batch["id"].astype(np.int32)
    batch["row"] = positions.astype(np.int32)
    batch["row_valid"] = np.ones(len(positions), np.uint8)
    return batch
