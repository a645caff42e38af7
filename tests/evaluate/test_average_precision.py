"""Average precision from histograms: exact counts, and as close to a sort of all scores as the docstring says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import scored

from sarjax.evaluate import average_precision as ap
from sarjax.evaluate.average_precision import BINS, average_precision, log_odds, score_histogram
from sarjax.train.collectives import collectives, totals

histogram = jax.jit(score_histogram, static_argnames="ignore_label")


def log_odds64(logits):
    z = np.asarray(logits, np.float64)
    return np.stack([z[..., c] - np.logaddexp.reduce(np.delete(z, c, -1), axis=-1) for c in range(z.shape[-1])], -1)


def sorted_average_precision(score, true):
    """Of all scores, one threshold for each different one: scikit-learn's definition, in float64."""
    order = np.argsort(-score, kind="stable")
    score, true = score[order], true[order]
    last = np.append(score[1:] != score[:-1], True)
    hits, above = np.cumsum(true)[last], np.arange(1, len(true) + 1)[last]
    recall = hits / hits[-1]
    return np.sum(np.diff(recall, prepend=0.0) * hits / above)


def image(pixels, k):
    return pixels.reshape((1, -1, 100, k) if k else (1, -1, 100))


def both_ways(logits, label):
    """Average precision per class, (ours, of all scores sorted)."""
    k = logits.shape[-1]
    logits = logits.astype(np.float32)
    ours = average_precision(np.asarray(histogram(image(logits, k), image(label, 0))))
    scores = log_odds64(logits)
    return ours, np.array([sorted_average_precision(scores[:, c], label == c) for c in range(k)])


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 30.0, 300.0])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_unrelated_and_good_logits_of_any_sharpness(scale, k):
    r = np.random.default_rng(k)
    logits = scale * r.standard_normal((20_000, k))
    label = r.integers(0, k, 20_000)
    off = 1e-3 if scale >= 1 else 3e-3  # hardly trained: all log-odds are nearly the same
    np.testing.assert_allclose(*both_ways(logits, label), atol=off)
    label = np.where(r.random(20_000) < 0.6, logits.argmax(-1), label)
    np.testing.assert_allclose(*both_ways(logits, label), atol=off)


@pytest.mark.parametrize("share", [0.25, 0.05, 0.01])
@pytest.mark.parametrize(("apart", "sharpness"), [(2.0, 2.0), (3.0, 5.0), (2.0, 1.0), (4.0, 20.0)])
def test_two_classes_one_of_them_rare(share, apart, sharpness):
    """Floods: a share of the pixels, scores that overlap, more or less sure of themselves."""
    r = np.random.default_rng(1)
    label = (r.random(50_000) < share).astype(int)
    odds = sharpness * (r.standard_normal(50_000) + apart * (label - 0.5)) - 2
    np.testing.assert_allclose(*both_ways(np.stack([-odds / 2, odds / 2], -1), label), atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 6), st.integers(2, 5))
def test_equal_scores_are_one_threshold(seed, levels, k):
    """Few different scores, far enough apart: no error at all."""
    r = np.random.default_rng(seed)
    choice = r.standard_normal((levels, k)) * r.choice([0.5, 5, 50, 200])
    logits = choice[r.integers(0, levels, 300)]
    label = r.integers(0, k, 300)
    label[:k] = np.arange(k)
    scores = np.sort(log_odds64(choice.astype(np.float32)), 0)
    gaps = np.diff(scores, axis=0) / (np.maximum(np.abs(scores[1:]), np.abs(scores[:-1])) + 1 / 64)
    if levels == 1 or gaps.min() > 0.02:
        np.testing.assert_allclose(*both_ways(logits, label), rtol=1e-9)


def test_a_perfect_a_reversed_and_a_blind_network():
    label = np.repeat([0, 0, 0, 1], 25)
    sure = 20.0 * np.eye(2)[label]
    np.testing.assert_allclose(both_ways(sure, label)[0], [1, 1])
    np.testing.assert_allclose(both_ways(-sure, label)[0], [0.75, 0.25])
    np.testing.assert_allclose(both_ways(0 * sure, label)[0], [0.75, 0.25])


def plain_count(logits, label, row_valid):
    bins = np.asarray(jax.jit(ap._bin)(jax.jit(log_odds)(logits)))
    out = np.zeros((logits.shape[-1], 2, BINS), np.int64)
    for at in np.ndindex(label.shape):
        if row_valid[at[0]] and label[at] < logits.shape[-1]:
            for c in range(logits.shape[-1]):
                out[c, int(label[at] == c), bins[at][c]] += 1
    return out


def test_counts_are_exact():
    logits, label, row_valid = scored()
    found = histogram(logits, label, row_valid)
    assert found.dtype == jnp.int32
    assert np.array_equal(found, plain_count(logits, label, row_valid))
    assert np.array_equal(histogram(logits, label), plain_count(logits, label, np.ones(8)))
    assert np.array_equal(histogram(logits, np.where(label == 255, 77, label), row_valid, ignore_label=77), found), (
        "another label to ignore"
    )
    values = average_precision(np.asarray(found))
    assert np.isnan(values[-1]), "never true"
    assert np.isfinite(values[:-1]).all()


def test_ignored_pixels_may_hold_anything():
    logits, label, row_valid = scored()
    counted = (label < 5) & (row_valid > 0)[:, None, None]
    for bad in (np.nan, np.inf, -np.inf, 1e38):
        broken = np.where(counted[..., None], logits, np.float32(bad))
        assert np.array_equal(histogram(broken, label, row_valid), histogram(logits, label, row_valid))
    assert np.asarray(histogram(np.full_like(logits, np.nan), label, row_valid)).sum() == 5 * counted.sum()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_sharded_batches_give_the_same_and_stay_where_they_are(shape):
    mesh = jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto,) * 2)
    logits, label, row_valid = scored()
    placed = jax.device_put((logits, label), NamedSharding(mesh, P("data", "space")))
    placed = *placed, jax.device_put(row_valid, NamedSharding(mesh, P("data")))
    step = jax.jit(score_histogram, out_shardings=NamedSharding(mesh, P())).lower(*placed).compile()
    assert np.array_equal(step(*placed), plain_count(logits, label, row_valid))
    assert set(totals(collectives(step.as_text()))) == {"all-reduce"}, "pixels are not sent anywhere, counts are"


def test_log_odds_where_probabilities_are_nearly_one():
    r = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 30.0, 300.0):
        logits = (scale * r.standard_normal((500, 4))).astype(np.float32)
        np.testing.assert_allclose(log_odds(logits), log_odds64(logits), rtol=1e-4, atol=1e-5)
    ties = np.array([[3, 3, 0], [3, 3, 3], [0, -200, -300], [-90, 60, 60]], np.float32)
    np.testing.assert_allclose(log_odds(ties), log_odds64(ties), rtol=1e-5, atol=1e-6)
    half = jnp.asarray(ties, jnp.bfloat16)
    assert log_odds(half).dtype == jnp.float32


def test_bins_increase_and_are_as_narrow_as_said():
    x = np.concatenate([-np.logspace(4, -8, 200_000), [0.0], np.logspace(-8, 4, 200_000)]).astype(np.float32)
    number = np.asarray(jax.jit(ap._bin)(x))
    assert (np.diff(number) >= 0).all()
    assert number[0] == 0
    assert number[-1] == BINS - 1
    assert number[np.searchsorted(x, -1)] < BINS // 2 == number[np.searchsorted(x, 0)]
    inside = np.abs(x) < 1000
    first = np.flatnonzero(np.diff(number[inside], prepend=-1))
    widths, edges = np.diff(x[inside][first]), np.abs(x[inside][first])
    assert (widths <= 0.0079 * np.maximum(edges[1:], edges[:-1]) + 2e-4).all()
    assert set(np.asarray(ap._bin(jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0])))) <= set(range(BINS))


def test_steps_by_hand():
    scores = np.zeros((3, 2, 6), np.int64)
    scores[0, 1, [5, 3, 0]] = 2, 1, 1
    scores[0, 0, [4, 3]] = 1, 3
    scores[1, 0, 2] = 9
    scores[2, 1, 0] = 4
    wanted = (2 * 2 / 2 + 1 * 3 / 7 + 1 * 4 / 8) / 4
    np.testing.assert_allclose(average_precision(scores), [wanted, np.nan, 1])
    huge = scores * 2**40
    np.testing.assert_allclose(average_precision(huge), [wanted, np.nan, 1])
