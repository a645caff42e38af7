"""Seconds and peak memory of building records: memory is the same for one scene and for many, and bounded by `jobs`.

    python tests/benchmarks/build.py --scenes 4 --size 5556x3704

One line of JSON: for 1 and N made-up scenes and 1 and 2 processes, the seconds of the build without statistics and
with them, and the largest sum of resident memory, in MiB, of the building process and its workers, sampled every 20 ms.
Pages that processes share are counted in each of them. Tiles are drawn at random, which one scene allows and which
reads every row once for each split: builds by scene take less time.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Bytes of resident memory, 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def watch(pids, done: threading.Event) -> int:
    """The largest sum of resident memory of `pids()` until `done`."""
    peak = 0
    while not done.wait(0.02):
        peak = max(peak, sum(map(resident, pids())))
    return peak


def measure(source: str, jobs: int, send) -> None:
    """In a process of its own, so that what an earlier build left in memory is not counted."""
    from sarjax.data.build import build

    stages: dict[str, float] = {}
    peaks: list[int] = []
    done, start = threading.Event(), time.perf_counter()
    everyone = lambda: [os.getpid(), *(p.pid for p in multiprocessing.active_children())]  # noqa: E731
    watcher = threading.Thread(target=lambda: peaks.append(watch(everyone, done)))
    watcher.start()

    def progress(stage: str, at: int, total: int) -> None:
        stages.setdefault(stage, time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as out:
        directory = build("whu_opt_sar", source, out, "random_tile", jobs=jobs, progress=progress)
        seconds = time.perf_counter() - start
        size = sum(p.stat().st_size for p in directory.iterdir())
    done.set()
    watcher.join()
    send.send(
        {
            "build_s": round(stages["statistics"], 2),
            "all_s": round(seconds, 2),
            "peak_mib": round(peaks[0] / 2**20),
            "records_mib": round(size / 2**20, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--size", default="2048x1536", help="width x height of a scene in pixels")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    from sarjax.data.synthesis import synthesize

    width, height = map(int, arguments.size.split("x"))
    context = multiprocessing.get_context("spawn")
    found = {"scenes": arguments.scenes, "size": [width, height], "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for scenes in (1, arguments.scenes):
            source = synthesize(f"{folder}/{scenes}", scenes, (width, height))
            for jobs in arguments.jobs:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=measure, args=(os.fspath(source), jobs, send))
                process.start()
                send.close()
                found["runs"].append({"scenes": scenes, "jobs": jobs} | receive.recv())
                process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
