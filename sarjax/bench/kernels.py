"""What runs beside the networks, each beside its obvious alternatives and its floor: `sarjax bench kernels`.

The floor is the time that the bytes which any implementation has to move would take at the rate of a large copy, or its
multiplications and additions at the rate of a large matrix product, whichever is longer; both rates are measured in the
same run. What fits into caches may be below it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from sarjax.bench import kernel_cases, timing
from sarjax.errors import UserError, unknown

Say = Callable[[str], None]


class Kernel(NamedTuple):
    """case: of a size. sizes: those that are measured where none are asked for, and the least. unit: what they count."""

    case: Callable[[int], kernel_cases.Case]
    sizes: tuple[int, ...]
    unit: str
    least: int = 1


KERNELS: dict[str, Kernel] = {
    "sinkhorn": Kernel(kernel_cases.sinkhorn, (65_536, 1_048_576), "pixels"),
    "neighbours": Kernel(kernel_cases.neighbours, (8_192, 20_000), "tiles", kernel_cases.NEIGHBOURS + 1),
    "confusion": Kernel(kernel_cases.confusions, (8, 32), "tiles"),
    "flips": Kernel(kernel_cases.flips, (8, 32), "tiles"),
    "views": Kernel(kernel_cases.views, (8, 32), "tiles"),
    "radiometry": Kernel(kernel_cases.noise, (8, 32), "tiles"),
}


def bench_kernels(
    names: Sequence[str] = (),
    *,
    sizes: Sequence[int] = (),
    repetitions: int = timing.REPETITIONS,
    say: Say = print,
) -> dict[str, Any]:
    """Seconds of each side of each kernel in turn, how far their results are apart, and times the floor.

    Sides that need a package that is not installed, or more memory than is sensible, are there with None.

    Args:
      names: of `KERNELS`; () = all.
      sizes: in the kernel's unit, for one kernel; () = its usual ones.
      repetitions: timed calls of each side.

    Raises:
      UserError: no such kernel, sizes for several kernels or too small ones, fewer than one repetition.
    """
    timing.check(repetitions)
    for name in names:
        if name not in KERNELS:
            raise unknown("kernel", name, KERNELS)
    if sizes and len(names) != 1:
        raise UserError("sizes are given, but each kernel has its own unit: the name of one kernel is accepted.")
    for size in sizes:
        kernel = KERNELS[names[0]]
        if size < kernel.least:
            raise UserError(f"size is {size}; a whole number of {kernel.unit} from {kernel.least} is accepted.")
    if absent := [name for name, there in kernel_cases.PEERS.items() if not there]:
        say(f"{' and '.join(absent)}: not installed, so without figures; pip install 'sarjax[bench]' would do")
    rates = timing.rates()
    rows = []
    for name in names or KERNELS:
        kernel = KERNELS[name]
        for size in sizes or kernel.sizes:
            say(f"{name}: {size:,} {kernel.unit}")
            rows += _measure(name, size, kernel, rates, repetitions)
    return {
        "benchmark": "kernels",
        "device": jax.devices()[0].device_kind,
        **timing.machine("torch", "POT"),
        "units": {name: KERNELS[name].unit for name in names or KERNELS},
        **rates,
        "rows": rows,
    }


def _measure(
    name: str, size: int, kernel: Kernel, rates: Mapping[str, float], repetitions: int
) -> list[dict[str, Any]]:
    case = kernel.case(size)
    there = {side: call for side, call in case.sides.items() if call is not None}
    results = {side: jax.block_until_ready(call()) for side, call in there.items()}
    apart = {side: case.difference(results["ours"], result) for side, result in results.items()}
    results.clear()
    found = timing.in_turns(there, repetitions, settle=True)
    floor = max(case.moved / rates["copy_bytes_per_second"], case.flops / rates["matrix_flops_per_second"])

    def row(side: str) -> dict[str, Any]:
        median = found[side]["median"] if side in found else None
        return {
            "kernel": name,
            "size": size,
            "side": side,
            "seconds": found.get(side),
            "times_ours": median and median / found["ours"]["median"],
            "times_floor": median and median / floor,
            "difference": apart.get(side),
            "floor_seconds": floor,
            "bytes": case.moved,
            "flops": case.flops,
        }

    return [row(side) for side in case.sides]
