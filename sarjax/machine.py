"""What machine this is, and how work is shared on it, without jax."""

import os
import platform
import sys
from pathlib import Path


def visible_cores(sharing: int = 1) -> int:
    """Cores that this process may use; at least 1. sharing: processes of one job on this machine, in case its
    scheduler gives them all of the machine's cores together.
    """
    there = os.cpu_count() or 1
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return max(1, min(visible, there // sharing))


def sharers(rows: int, devices: int) -> int:
    """The largest number of devices, of those there are, that `rows` can be shared by equally."""
    return next(n for n in range(max(1, min(devices, rows)), 0, -1) if rows % n == 0)


def processor() -> str:
    """The processor's name, as Linux tells it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def available_memory() -> int | None:
    """Bytes that this process could still take without swapping, or None where the machine does not tell.

    On Linux what is free or can be freed at once, or what its control group leaves, if that is less.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def ask_for_huge_pages() -> None:
    """Starts the running command line anew, in this process, with huge pages for large arrays where it has none.

    A step on a CPU takes hundreds of megabytes and gives them back; where the kernel gives huge pages to those who ask
    (madvise), a fifth of its time is spent on small ones (docs/performance.md). The C library reads what asks for them
    before anything else runs, hence the new start. A GLIBC_TUNABLES of one's own, also an empty one, is left as it is;
    elsewhere than on Linux with glibc nothing happens.
    """
    if (
        sys.platform != "linux"
        or "GLIBC_TUNABLES" in os.environ
        or platform.libc_ver()[0] != "glibc"
        or not sys.executable
    ):
        return
    try:
        given = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return
    if "[madvise]" in given:
        sys.stdout.flush()
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
