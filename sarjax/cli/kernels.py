"""`sarjax bench kernels`: what runs beside the networks, each beside its alternatives and its floor."""

from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli import common
from sarjax.cli.common import note


def kernels(
    names: Positional[tuple[str, ...]] = (),
    sizes: tuple[int, ...] = (),
    repetitions: int = 5,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Time Sinkhorn, neighbours, confusion matrices and augmentation beside alternatives and their floor

    Sides take turns in one process, on made-up input, and their results are compared. The floor is the time that the
    bytes (or operations) which are needed would take at the rate of a large copy (or product) of the same run.

    Args:
        names: sinkhorn, neighbours, confusion, flips, views, radiometry (default: all).
        sizes: of one kernel: pixels (sinkhorn) or tiles (default: its usual two).
        repetitions: timed calls of each side, after a warm-up.
        json: print one JSON line instead of a table.
    """
    common.devices(1)
    from sarjax.bench.kernels import bench_kernels
    from sarjax.cli.bench import show

    with common.stoppable("nothing was written"):
        found = bench_kernels(names, sizes=sizes, repetitions=repetitions, say=note)
    show(found, json)
