"""Tiles into batches on devices: ours from records, a PyTorch DataLoader's from TIFF windows: `sarjax bench input`.

Both read the same tiles of the same made-up scenes, in a random order, and must find the same in them, or nothing is
reported. Every side has a process of its own, on one core and on all. Files are in the system's cache: it is decoding
that is measured, and not the disk.
"""

import contextlib
import functools
import importlib.util
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarjax import raster
from sarjax.bench import timing
from sarjax.bench.apart import Apart, first_cores
from sarjax.data.build import build
from sarjax.data.store import Dataset, open_directory
from sarjax.data.synthesis import FOLDERS, synthesize
from sarjax.errors import UserError
from sarjax.machine import sharers, visible_cores

SIZE = (5556, 3704)  # width and height of a published scene
PIXELS = 100 * SIZE[0] * SIZE[1]  # of all that are published
COMPRESSIONS = ("zstd", "zlib", "none")
SENSORS = ("sar", "optical")
# Random windows of a hundred scenes are rarely found decoded in GDAL's cache of 5 % of the memory; those of a few
# scenes would always be. "scenes" gets as large a share of what is read as a cache of this size would be of them all.
CACHE = 2**30
PEERS = {
    "scenes": "windows of the scenes, files kept open, a cache as large for them as 1 GB is for all 100",
    "cached": "windows of the scenes, files kept open, all decoded scenes in GDAL's cache",
    "tiles": "a TIFF for each tile and sensor, cut before",
}

Say = Callable[[str], None]


class Cut(NamedTuple):
    """Where a tile lies: its scene's file name, first row and column; side in pixels."""

    file: str
    row: int
    column: int
    side: int


def bench_input(
    *,
    scenes: int = 2,
    size: tuple[int, int] = SIZE,
    batch: int = 8,
    sensors: Sequence[str] = SENSORS,
    threads: int = 2,
    repetitions: int = timing.REPETITIONS,
    peers: Sequence[str] = tuple(PEERS),
    folder: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Tiles per second, from files to arrays on devices, by how they are stored and by who reads them.

    Args:
      scenes, size: how many are made up, (width, height) of each; three fifths of their tiles are read.
      batch: tiles in a batch; what is left over is not read.
      sensors: whose images are read, beside labels.
      threads: that read ahead for us, as `execution.prefetch`.
      repetitions: passes over all tiles of each side, in turn.
      peers: of `PEERS`; () = ours alone.
      folder: where scenes and records are made, and left; None = a folder that goes at the end.

    Raises:
      UserError: fewer tiles than a batch, a folder that cannot be used, and sides that find different tiles.
    """
    timing.check(repetitions)
    if peers and importlib.util.find_spec("torch") is None:
        say("torch is not installed (pip install 'sarjax[bench]'): its figures are left out")
    with place(folder) as root:
        source, records = _prepare(root, scenes, size, say)
        datasets = {name: open_directory(path) for name, path in records.items()}
        cuts = _cuts(datasets["zstd"])
        if len(cuts) < batch:
            raise UserError(f"there are {len(cuts)} tiles, fewer than a batch of {batch}; larger scenes are accepted.")
        if "tiles" in peers:
            _cut(source, root / "tiles", cuts, sensors)
        every = visible_cores()
        with contextlib.ExitStack() as stack:
            sides: dict[tuple[str, str, int], Callable[[str], Any]] = {}
            for cores in dict.fromkeys((first_cores(1), every)):
                ours = stack.enter_context(Apart(Records, records, batch, sensors, threads, cores, cores=cores))
                sides |= {("sarjax", name, cores): functools.partial(ours, name) for name in records}
                for name in peers if importlib.util.find_spec("torch") else ():
                    theirs = Apart(_torch, root, source, name, _cache(name, scenes, size), cuts, batch, sensors, cores)
                    sides["torch", name, cores] = stack.enter_context(theirs)
            say(f"reading {len(cuts)} tiles of {scenes} scenes by {len(sides)} sides")
            _check(sides)
            found = timing.in_turns(sides, repetitions, clock=lambda side: side("seconds"))
            device = next(iter(sides.values()))("device")
        tiles = len(cuts) // batch * batch
        sizes = {name: _bytes(dataset) / sum(dataset.statistics.tiles.values()) for name, dataset in datasets.items()}
    return {
        "benchmark": "input",
        "device": device,
        **timing.machine("array_record", "grain", "rasterio", *(["torch"] if peers else [])),
        "scenes": scenes,
        "size": list(size),
        "batch": batch,
        "sensors": list(sensors),
        "threads": threads,
        "rows": [
            _row(*key, spread, tiles, sizes, found["sarjax", "zstd", key[2]]["median"]) for key, spread in found.items()
        ]
        + [
            {"side": "torch", "from": name, "cores": None, "seconds": None}
            for name in peers
            if ("torch", name, every) not in found
        ],
        "from": {f"torch, {name}": PEERS[name] for name in peers},
    }


def _row(
    side: str, kind: str, cores: int, spread: dict[str, float], tiles: int, sizes: dict[str, float], ours: float
) -> dict[str, Any]:
    rate = tiles / spread["median"]
    return {
        "side": side,
        "from": kind,
        "cores": cores,
        "seconds": spread,
        "tiles_per_second": rate,
        "tiles_per_second_per_core": rate / cores,
        "times_ours": spread["median"] / ours,
        "bytes_of_a_tile": sizes.get(kind) if side == "sarjax" else None,
    }


def _cache(name: str, scenes: int, size: tuple[int, int]) -> int:
    """Megabytes of GDAL's cache for a peer; 0 = as GDAL chooses."""
    return max(1, round(CACHE * scenes * size[0] * size[1] / PIXELS / 2**20)) if name == "scenes" else 0


# --- What is read


@contextlib.contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="sarjax-bench-") as made:
        yield Path(made)


def _prepare(root: Path, scenes: int, size: tuple[int, int], say: Say) -> tuple[Path, dict[str, Path]]:
    """(the folder of scenes, {compression: the folder of records})."""
    say(f"making {scenes} scenes of {size[0]} x {size[1]} pixels, and records of them")
    source = synthesize(root / "scenes", scenes, size)
    return source, {
        name: build("whu_opt_sar", source, root / name, "random_tile", compression=name) for name in COMPRESSIONS
    }


def _cuts(dataset: Dataset) -> list[Cut]:
    """Where the tiles of the training split lie, in its order."""
    found = []
    for name in dataset.split("train").names:
        scene, _, place = name.rpartition("/r")
        row, column = map(int, place.split("c"))
        found.append(Cut(f"{scene}.tif", row, column, dataset.tile[0]))
    return found


def _cut(source: Path, out: Path, cuts: Sequence[Cut], sensors: Sequence[str]) -> None:
    """Writes each tile into files of its own, as the scenes are: LZW TIFF."""
    for folder in (name for name in FOLDERS if name in (*sensors, "lbl")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for i, cut in enumerate(cuts):
            window = (cut.row, cut.column, cut.side, cut.side)
            raster.write(out / folder / f"{i}.tif", raster.read(source / folder / cut.file, window))


def _bytes(dataset: Dataset) -> int:
    return sum(path.stat().st_size for path in dataset.directory.glob("*.array_record-*"))


def _check(sides: dict[tuple[str, str, int], Callable[[str], Any]]) -> None:
    """UserError unless all sides find the same in the same tiles; a pass leaves out those that fill no batch."""
    first, known = None, {}
    for side, ask in sides.items():
        sums = ask("sums")
        first = first or side
        for tile, found in sums.items():
            if known.setdefault(tile, found) != found:
                raise UserError(f"{side[0]} ({side[1]}) finds another tile {tile} than {first[0]} ({first[1]}).")


# --- Sides, each in its process. A call is a pass over all tiles in a random order.


class Records:
    """Ours: `Batches` read ahead by threads, and put on as many host devices as there are cores, as in a run."""

    def __init__(
        self, folders: dict[str, Path], batch: int, sensors: Sequence[str], threads: int, cores: int
    ):  # the arguments come through a pipe
        import jax

        jax.config.update("jax_num_cpu_devices", sharers(batch, cores))
        from sarjax.config import Mesh
        from sarjax.data.pipeline import Batches
        from sarjax.spec import Stream
        from sarjax.train.mesh import make_mesh

        self._mesh, self._threads, self._passes = make_mesh(Mesh()), threads, 0
        splits = {name: open_directory(path).split("train", sensors) for name, path in folders.items()}
        self._batches = {
            name: Batches(split, {"labelled": Stream("labelled")}, batch_size=batch, seed=0)
            for name, split in splits.items()
        }
        self._steps = {name: len(split) // batch for name, split in splits.items()}

    def __call__(self, name: str, what: str) -> Any:
        import jax

        from sarjax.train.mesh import put_batch

        if what == "device":
            return jax.devices()[0].device_kind
        steps, sums, before = self._steps[name], {}, None
        self._passes += 1
        start = time.perf_counter()
        with contextlib.closing(
            self._batches[name].iterate(self._passes * steps, (self._passes + 1) * steps, self._threads)
        ) as feed:
            for batch in feed:
                on_device = put_batch(self._mesh, batch)
                jax.block_until_ready(before)  # one is on its way while the next is made
                before = on_device
                if what == "sums":
                    rows = jax.device_get(on_device["labelled"])
                    images = {key: value[:, 0] for key, value in rows.items() if key in SENSORS}
                    sums |= checksums(rows["position"], images, rows["label"])
            jax.block_until_ready(before)
        return sums if what == "sums" else time.perf_counter() - start


def checksums(positions: np.ndarray, images: dict[str, np.ndarray], labels: np.ndarray) -> dict[int, int]:
    """{position of the tile: sum of its images (b, h, w, c), by name, and labels (b, h, w)}."""
    parts = [*(images[name] for name in sorted(images)), labels]
    return {
        int(p): zlib.crc32(b"".join(np.ascontiguousarray(part[i]).tobytes() for part in parts))
        for i, p in enumerate(positions)
    }


def _torch(root: Path, source: Path, name: str, cache: int, *arguments: Any) -> Callable[[str], Any]:
    import os

    # GDAL reads it once, from the environment; that of this project's own process does not count for the peer.
    os.environ.pop("GDAL_CACHEMAX", None)
    if cache:
        os.environ["GDAL_CACHEMAX"] = str(cache)
    from sarjax.bench.torch_input import Windows

    return Windows(root / "tiles" if name == "tiles" else source, name == "tiles", *arguments)
