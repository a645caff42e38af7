"""Losses over valid pixels: against float64, against optax and torch's convention, and by their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax.losses import pixel

cross_entropy = jax.jit(pixel.cross_entropy, static_argnames=("label_smoothing", "ignore_label"))
dice_loss = jax.jit(pixel.dice_loss, static_argnames=("smooth", "ignore_label"))
LOSSES = {"cross_entropy": cross_entropy, "dice": dice_loss}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def case(seed=0, b=3, h=6, w=5, k=4):
    """Class k-1 is absent, image 1 is ignored as a whole, and so is a tenth of the rest."""
    r = np.random.default_rng(seed)
    logits = (3 * r.standard_normal((b, h, w, k))).astype(np.float32)
    labels = r.integers(0, k - 1, (b, h, w)).astype(np.uint8)
    labels[r.random((b, h, w)) < 0.1] = 255
    labels[1] = 255
    return logits, labels


def value(pair):
    return float(pair[0]) / float(pair[1])


def softmax64(logits):
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def cross_entropy64(logits, labels, w, u, smoothing):
    log_p, k = np.log(softmax64(logits)), logits.shape[-1]
    total = weight = 0.0
    for at in np.ndindex(labels.shape):
        if (y := labels[at]) < k:
            total += u[at] * (1 - smoothing) * w[y] * -log_p[at][y]
            total += u[at] * smoothing / k * np.sum(w * -log_p[at])
            weight += u[at] * w[y]
    return total, weight


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_cross_entropy_against_float64(seed, by_class, by_pixel, smoothing):
    logits, labels = case(seed)
    r = np.random.default_rng(seed + 1)
    w = r.uniform(0.2, 3, 4).astype(np.float32) if by_class else np.ones(4, np.float32)
    u = (r.random(labels.shape) * (r.random(labels.shape) > 0.2)).astype(np.float32)
    u = u if by_pixel else np.ones(labels.shape, np.float32)
    got = cross_entropy(
        logits,
        labels,
        class_weights=w if by_class else None,
        pixel_weights=u if by_pixel else None,
        label_smoothing=smoothing,
    )
    np.testing.assert_allclose(got, cross_entropy64(logits, labels, w, u, smoothing), rtol=1e-5)


def test_cross_entropy_against_optax():
    logits, labels = case(2)
    per_pixel = optax.softmax_cross_entropy_with_integer_labels(logits, np.where(labels < 4, labels, 0).astype(int))
    assert value(cross_entropy(logits, labels)) == pytest.approx(float(per_pixel[labels < 4].mean()), rel=1e-5)


def test_a_uniform_prediction_costs_log_k():
    total, weight = cross_entropy(jnp.zeros((2, 3, 3, 5)), jnp.zeros((2, 3, 3), jnp.uint8))
    assert weight == 18
    assert float(total) == pytest.approx(18 * np.log(5), rel=1e-6)


def dice64(logits, labels):
    p, k = softmax64(logits), logits.shape[-1]
    keep = labels < k
    losses = []
    for c in range(k):
        t = (labels == c)[keep]
        if t.any():
            losses.append(1 - 2 * p[keep][t, c].sum() / (p[keep][:, c].sum() + t.sum()))
    return sum(losses), len(losses)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20))
def test_dice_against_float64(seed):
    logits, labels = case(seed)
    np.testing.assert_allclose(dice_loss(logits, labels), dice64(logits, labels), rtol=1e-5)


def test_dice_against_optax_where_nothing_is_ignored():
    logits, labels = case(3)
    labels = np.where(labels == 255, 3, labels)
    expected = optax.losses.dice_loss(logits, jax.nn.one_hot(labels, 4), smooth=1e-6, axis=(0, 1, 2))
    assert value(dice_loss(logits, labels)) == pytest.approx(float(expected), rel=1e-5)


def test_dice_of_the_truth_is_zero_and_of_its_opposite_one():
    labels = np.array([[[0, 1, 1, 255]]])
    sure = 1e4 * (2.0 * np.eye(2, dtype=np.float32)[np.where(labels < 2, labels, 0)] - 1)
    assert value(dice_loss(sure, labels)) == pytest.approx(0, abs=1e-6)
    assert value(dice_loss(-sure, labels)) == pytest.approx(1, abs=1e-6)


@each_loss
def test_tiling_the_image_leaves_the_loss_unchanged(loss):
    logits, labels = case()
    tiled = loss(np.tile(logits, (1, 2, 2, 1)), np.tile(labels, (1, 2, 2)))
    assert value(tiled) == pytest.approx(value(loss(logits, labels)), rel=1e-5)


@each_loss
def test_order_of_pixels_does_not_matter(loss):
    logits, labels = case()
    order = np.random.default_rng(0).permutation(labels.size)
    mixed = loss(logits.reshape(-1, 4)[order].reshape(logits.shape), labels.reshape(-1)[order].reshape(labels.shape))
    np.testing.assert_allclose(mixed, loss(logits, labels), rtol=1e-5)


@each_loss
def test_ignored_pixels_get_a_gradient_of_exactly_zero(loss):
    logits, labels = case()
    gradient = np.asarray(jax.grad(lambda z: loss(z, labels)[0])(logits))
    assert not gradient[labels == 255].any()
    assert (np.abs(gradient[labels < 4]).max(-1) > 0).all()


@each_loss
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_ignored_may_be_anything(loss, bad):
    logits, labels = case()
    broken = np.where((labels == 255)[..., None], np.float32(bad), logits)
    assert np.array_equal(loss(broken, labels), loss(logits, labels))
    gradient = np.asarray(jax.grad(lambda z: loss(z, labels)[0])(broken))
    assert np.isfinite(gradient).all()


@each_loss
def test_no_valid_pixel_is_zero_over_zero(loss):
    logits, labels = case()
    nothing = np.full_like(labels, 255)
    assert tuple(map(float, loss(logits, nothing))) == (0, 0)
    assert not np.asarray(jax.grad(lambda z: loss(z, nothing)[0])(logits)).any()


@each_loss
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_are_finite(loss, scale):
    logits, labels = case()
    logits = np.sign(logits) * scale
    (total, _), gradient = jax.value_and_grad(lambda z: loss(z, labels), has_aux=True)(logits.astype(np.float32))
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()


@each_loss
def test_half_precision_logits_are_summed_in_float32(loss):
    logits, labels = case(b=8, h=64, w=64)
    half = jnp.asarray(logits, jnp.bfloat16)
    total, _ = loss(half, labels)
    assert total.dtype == jnp.float32
    assert float(total) == pytest.approx(float(loss(half.astype(jnp.float32), labels)[0]), rel=1e-6)


@each_loss
def test_another_ignore_label_and_labels_out_of_range(loss):
    logits, labels = case()
    moved = np.where(labels == 255, 0, labels.astype(np.int32) + 1)
    shifted = np.concatenate([np.full((*labels.shape, 1), -1e9, np.float32), logits], -1)
    np.testing.assert_allclose(loss(shifted, moved, ignore_label=0), loss(logits, labels), rtol=1e-5)
    for stray in (-1, 4, 77):
        np.testing.assert_array_equal(
            loss(logits, np.where(labels == 255, stray, labels.astype(np.int32))), loss(logits, labels)
        )


def test_one_pixel():
    z, y = np.array([[[[0.3, -1.0]]]], np.float32), np.array([[[1]]])
    assert value(cross_entropy(z, y)) == pytest.approx(np.log1p(np.exp(1.3)), rel=1e-6)
    p = 1 / (1 + np.exp(1.3))
    assert value(dice_loss(z, y)) == pytest.approx(1 - 2 * p / (p + 1), rel=1e-5)


def test_microbatches_of_cross_entropy_add_up():
    logits, labels = case(b=4)
    w = np.array([1.0, 2.0, 0.5, 3.0], np.float32)
    whole = cross_entropy(logits, labels, class_weights=w)
    parts = [cross_entropy(logits[i : i + 2], labels[i : i + 2], class_weights=w) for i in (0, 2)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


def test_class_weights():
    w = pixel.class_weights_from_histogram((400, 100, 0, 25))
    assert w.dtype == np.float32
    assert w[2] == 1
    assert w[[0, 1, 3]].mean() == pytest.approx(1)
    np.testing.assert_allclose(w[[1, 3]] / w[0], [2, 4], rtol=1e-6)
    assert np.array_equal(pixel.class_weights_from_histogram((0, 0)), [1, 1])
