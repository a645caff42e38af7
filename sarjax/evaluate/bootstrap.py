"""How sure a difference is: a paired bootstrap over tiles."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

# Counted up when the same tiles would give another interval for a reason that the arguments do not say.
VERSION = 1
PerTile = Mapping[int, Int64[np.ndarray, "k k"]]


class Difference(NamedTuple):
    """metric(a) - metric(b) on all tiles, and the low and the high percentile of it over resampled tiles."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    a: Sequence[PerTile],
    b: Sequence[PerTile],
    metric: Callable[[Int64[np.ndarray, "k k"]], float],
    *,
    resamples: int = 2000,
    percentiles: tuple[float, float] = (2.5, 97.5),
    seed: int = 0,
) -> Difference:
    """Resamples tiles with replacement, the same ones for both sides, and pools each side's confusion matrices.

    a, b: per side, {tile id: confusion matrix} of each seed's run; a side's metric is the mean over its seeds. So the
    interval says what other tiles would have given, not what other seeds would have.
    metric: (k, k) -> number, such as a class's IoU. percentiles: between which the interval lies, 95 % unless told.

    Raises:
      ValueError: the runs were not evaluated on the same tiles.
    """
    ids = list(a[0])
    if any(set(run) != set(ids) for run in (*a, *b)):
        raise ValueError("a paired bootstrap needs runs that were evaluated on the same tiles")
    sides = [np.stack([[run[i] for i in ids] for run in side]) for side in (a, b)]  # (seeds, tiles, k, k)

    def difference(counts: np.ndarray) -> float:
        means = [np.mean([metric(m) for m in np.einsum("stij,t->sij", side, counts)]) for side in sides]
        return float(means[0] - means[1])

    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), resamples)
    low, high = np.nanpercentile([difference(counts) for counts in draws], percentiles)
    return Difference(difference(np.ones(len(ids), np.int64)), float(low), float(high))
