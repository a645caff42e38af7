"""Seconds and peak memory of building records, alone and with several processes: `sarjax bench build`."""

import collections
import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sarjax.bench import timing
from sarjax.bench.apart import Apart
from sarjax.bench.input import SIZE, Say, place
from sarjax.data.build import build
from sarjax.data.synthesis import synthesize

INTERVAL = 0.02  # seconds between two looks at the memory
MEASURED = (
    "peak_mib: the largest sum of resident memory of the building process and its workers; pages that processes share "
    "count in each"
)


def bench_build(
    *,
    scenes: Sequence[int] = (3,),
    size: tuple[int, int] = SIZE,
    jobs: Sequence[int] = (1, 2),
    compression: str = "zstd",
    repetitions: int = timing.REPETITIONS,
    folder: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Seconds per scene and memory of `sarjax data build whu_opt_sar`, by scenes and processes, in turn.

    Args:
      scenes: how many are made up; each number is built. From 3 on they are split by scene, fewer by tile, for which
        each row of tiles is read once for every split.
      size: (width, height) of a scene.
      jobs: numbers of processes.
      compression: of the records.
      repetitions: builds of each, in a process of its own.
      folder: where scenes are made, and left; None = a folder that goes at the end.

    Raises:
      UserError: numbers that make no scenes, a folder that cannot be used, what a build raises.
    """
    timing.check(repetitions)
    facts: dict[tuple[int, int], dict[str, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    with place(folder) as root:
        sources = {}
        for n in scenes:
            say(f"making {n} scenes of {size[0]} x {size[1]} pixels")
            sources[n] = synthesize(root / f"scenes-{n}", n, size)

        def once(n: int, processes: int) -> float:
            say(f"building {n} scenes, --jobs {processes}")
            with Apart(_measure, sources[n], "scene" if n >= 3 else "random_tile", processes, compression) as measure:
                found = measure()
            for name, value in found.items():
                facts[n, processes][name].append(value)
            return found["seconds"]

        keys = [(n, processes) for n in scenes for processes in jobs]
        sides = {key: lambda key=key: once(*key) for key in keys}
        spreads = timing.in_turns(sides, repetitions, clock=lambda side: side())
    return {
        "benchmark": "build",
        **timing.machine("tensorflow-datasets", "array_record", "rasterio"),
        "size": list(size),
        "compression": compression,
        "measured": MEASURED,
        "rows": [
            {
                "scenes": n,
                "jobs": processes,
                "seconds": spread,
                "seconds_per_scene": spread["median"] / n,
                **{
                    name: timing.spread(values[1:])["median"]
                    for name, values in facts[n, processes].items()
                    if name != "seconds"
                },
            }
            for (n, processes), spread in spreads.items()
        ],
    }


def _measure(source: Path, config: str, jobs: int, compression: str) -> Callable[[], dict[str, float]]:
    """In a process of its own, so that what an earlier build left in memory is not counted."""

    def measure() -> dict[str, float]:
        stages: dict[str, float] = {}
        with tempfile.TemporaryDirectory(dir=source.parent) as out, _peak() as peak:
            start = time.perf_counter()
            directory = build(
                "whu_opt_sar",
                source,
                out,
                config,
                jobs=jobs,
                compression=compression,
                progress=lambda stage, at, total: stages.setdefault(stage, time.perf_counter() - start),
            )
            end = time.perf_counter() - start
            size = sum(p.stat().st_size for p in directory.iterdir())
        return {
            "seconds": end,
            "records_seconds": stages["statistics"],
            "statistics_seconds": end - stages["statistics"],
            "peak_mib": peak() / 2**20,
            "records_mib": size / 2**20,
        }

    return measure


@contextlib.contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """What gives, after the block, the largest sum of bytes of this process and its workers that was resident in it."""
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(INTERVAL):
            pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
            largest = max(largest, sum(map(_resident, pids)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: largest
    finally:
        done.set()
        watcher.join()


def _resident(pid: int) -> int:
    """Bytes of resident memory, 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
