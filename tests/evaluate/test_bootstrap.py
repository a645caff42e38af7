"""The paired bootstrap: exact on all tiles, paired, and as wide as the tiles differ."""

import numpy as np
import pytest

from sarjax.evaluate.bootstrap import paired_bootstrap
from sarjax.evaluate.metrics import metrics


def iou(matrix):
    return metrics(matrix).iou[1]


def run(accuracies, pixels=100):
    """One matrix a tile: that share of each class is right."""
    hits = np.round(np.asarray(accuracies) * pixels).astype(np.int64)
    return {i: np.array([[h, pixels - h], [pixels - h, h]]) for i, h in enumerate(hits)}


def test_the_value_is_that_of_all_tiles():
    a, b = run([0.9, 0.5, 0.7]), run([0.6, 0.4, 0.8])
    expected = iou(sum(a.values())) - iou(sum(b.values()))
    found = paired_bootstrap([a], [b], iou, resamples=50)
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high


def test_pairs_share_their_tiles():
    """One side better by the same on every tile: certain, however much tiles differ from each other."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 40)
    apart = paired_bootstrap([run(hard + 0.05)], [run(hard)], iou)
    assert 0 < apart.low < apart.value < apart.high < 0.12
    same = paired_bootstrap([run(hard)], [run(hard)], iou)
    assert same == (0.0, 0.0, 0.0)
    noise = paired_bootstrap([run(np.clip(hard + rng.normal(0, 0.2, 40), 0, 1))], [run(hard)], iou)
    assert noise.low < 0 < noise.high


def test_95_percent_lie_between():
    """Tiles of one class whose accuracies are Gaussian: the mean of n of them lies within 1.96 sd / sqrt(n)."""
    right = np.round(np.clip(np.random.default_rng(1).normal(0.5, 0.1, 400), 0, 1) * 10_000)
    a = {i: np.array([[h, 10_000 - h], [0, 0]], np.int64) for i, h in enumerate(right)}
    b = {i: np.array([[0, 10_000], [0, 0]], np.int64) for i in range(400)}
    found = paired_bootstrap([a], [b], lambda m: m[0, 0] / m.sum())
    half = 1.96 * np.std(right / 10_000) / np.sqrt(400)
    assert found.high - found.value == pytest.approx(half, rel=0.08)
    assert found.value - found.low == pytest.approx(half, rel=0.08)
    narrow = paired_bootstrap([a], [b], lambda m: m[0, 0] / m.sum(), percentiles=(25, 75))
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 / 1.96 * half, rel=0.08)


def test_seeds_are_averaged_and_order_is_free():
    a = [run([0.9, 0.5]), run([0.7, 0.3])]
    b = [dict(reversed(run([0.6, 0.4]).items()))]
    expected = np.mean([iou(sum(r.values())) for r in a]) - iou(sum(b[0].values()))
    assert paired_bootstrap(a, b, iou, resamples=20).value == pytest.approx(expected)


def test_other_tiles_are_refused():
    with pytest.raises(ValueError, match="same tiles"):
        paired_bootstrap([run([0.5, 0.6])], [run([0.5])], iou)
