"""How everything is timed here: the sides take turns in one process, and each is told by its median and spread."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sarjax.errors import UserError
from sarjax.machine import processor, visible_cores

Side = Callable[[], Any]
REPETITIONS = 5
LONG = 5.0  # seconds


def in_turns(
    sides: Mapping[str, Side],
    repetitions: int = REPETITIONS,
    *,
    settle: bool = False,
    clock: Callable[[Side], float] | None = None,
) -> dict[str, dict[str, float]]:
    """{side: {"median", "min", "max" in seconds, "n"}} of sides that are called in turn: A B A B ...

    A side returns when its work is done, or something that `jax.block_until_ready` waits for. Each is called once
    before anything counts.

    Args:
      settle: call each side once more, untimed, before each call that counts, so that no side pays for the caches and
        for the threads that still spin which the one before it has left; worth it where a call takes less than seconds,
        so left out for sides whose calls take longer than `LONG`.
      clock: calls a side and says its seconds, where it knows better than the clock on the wall here.

    Raises:
      UserError: fewer than one repetition.
    """
    check(repetitions)
    clock = clock or _seconds
    first = {name: clock(side) for name, side in sides.items()}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            if settle and first[name] < LONG:
                clock(side)
            found[name].append(clock(side))
    return {name: spread(values) for name, values in found.items()}


def check(repetitions: int) -> None:
    """UserError for fewer than one; for who has work to do before `in_turns`."""
    if repetitions < 1:
        raise UserError(f"repetitions is {repetitions}; a whole number from 1 is accepted.")


def _seconds(side: Side) -> float:
    start = time.perf_counter()
    result = side()
    if result is not None:
        import jax

        jax.block_until_ready(result)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the least, the largest, and how many there were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def machine(*packages: str) -> dict[str, Any]:
    """On what was measured: the processor, the cores that were visible, the versions of sarjax, jax and `packages`.

    A package that is not installed is None.
    """
    versions: dict[str, str | None] = {}
    for name in ("sarjax", "jax", "jaxlib", "numpy", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": processor(),
        "cores": visible_cores(),
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", "").strip(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions,
    }


def rates(precision: str = "float32") -> dict[str, float]:
    """What this machine reaches at best: of a large matrix product, flops/s, and of a large copy, bytes/s.

    A multiply-accumulate counts 2, a copied byte 2: it is read and written. Over all devices that a program of one
    device can use: on a CPU all cores.
    """
    import jax
    import jax.numpy as jnp

    side = 2048 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.dtype(precision)
    matrix = jnp.ones((side, side), dtype)
    # Larger than caches, and with an operand that changes, so that it is not folded.
    vector = jnp.ones((2**26,), jnp.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    found = in_turns({"product": lambda: product(matrix), "copy": lambda: copy(vector)})
    return {
        "matrix_flops_per_second": 2 * side**3 / found["product"]["min"],
        "copy_bytes_per_second": 2 * vector.nbytes / found["copy"]["min"],
    }
