"""Distillation terms: equal to public code, to float64 on random maps, and by their invariances."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.losses import distillation

feature_loss = jax.jit(distillation.feature_loss, static_argnames="kind")
logit_distillation = jax.jit(distillation.logit_distillation)
channel_wise = jax.jit(distillation.channel_wise_distillation)


def norm64(x):
    n = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(n > 1e-12, n, np.inf)


def kl64(t, s):
    log_t, log_s = (x - np.logaddexp.reduce(x) for x in (t, s))
    return np.sum(np.exp(log_t) * (log_t - log_s))


def normalised64(s, t, w):
    return (w * ((norm64(s) - norm64(t)) ** 2).sum(-1)).sum(), w.sum()


def squared64(s, t, w):
    return (w * ((s - t) ** 2).mean(-1)).sum(), w.sum()


def logits64(s, t, w, temperature):
    values = [w[p] * kl64(t[p] / temperature, s[p] / temperature) for p in np.ndindex(w.shape)]
    return temperature**2 * sum(values), w.sum()


def channels64(s, t, w, temperature):
    total, rows = 0.0, 0
    for row in range(len(w)):
        seen = w[row] > 0
        if seen.any():
            log_w = np.log(w[row][seen])[:, None]
            z_t, z_s = (x[row][seen] / temperature + log_w for x in (t, s))
            total += temperature**2 * np.mean([kl64(z_t[:, c], z_s[:, c]) for c in range(s.shape[-1])])
            rows += 1
    return total, rows


LOSSES = {
    "normalised": (partial(feature_loss, kind="normalised"), normalised64),
    "squared": (partial(feature_loss, kind="squared"), squared64),
    "logits": (partial(logit_distillation, temperature=2.0), partial(logits64, temperature=2.0)),
    "channels": (partial(channel_wise, temperature=3.0), partial(channels64, temperature=3.0)),
}
each_loss = pytest.mark.parametrize("loss", [loss for loss, _ in LOSSES.values()], ids=LOSSES)


def case(seed=0, b=3, h=6, w=5, c=4, scale=2.0):
    """Soft weights, a third of them 0; image 1 has none."""
    r = np.random.default_rng(seed)
    s, t = (scale * r.standard_normal((2, b, h, w, c))).astype(np.float32)
    weights = (r.random((b, h, w)) * (r.random((b, h, w)) > 1 / 3)).astype(np.float32)
    weights[0, 0, 0] = 1
    if b > 1:
        weights[1] = 0
    return s, t, weights


def value(pair):
    return float(pair[0]) / float(pair[1])


def gradients(loss, *args):
    """Of the total, by student and teacher."""
    return map(np.asarray, jax.grad(lambda s, t, w: loss(s, t, w)[0], (0, 1))(*map(jnp.asarray, args)))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**30), scale=st.sampled_from([0.1, 1.0, 5.0, 40.0]))
def test_against_float64(name, seed, scale):
    loss, reference = LOSSES[name]
    s, t, w = case(seed, scale=scale)
    wanted = reference(*(x.astype(np.float64) for x in (s, t, w)))
    np.testing.assert_allclose(loss(s, t, w), wanted, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("loss", "reference"), [(logit_distillation, logits64), (channel_wise, channels64)])
def test_temperatures_against_float64(loss, reference, temperature):
    s, t, w = case(4)
    found = loss(s, t, w, temperature=temperature)
    np.testing.assert_allclose(found, reference(*map(np.float64, (s, t, w)), temperature), rtol=3e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_differences(name):
    loss, reference = LOSSES[name]
    s, t, w = case(1, h=3, w=2)
    found, _ = gradients(loss, s, t, w)
    s, t, w = (x.astype(np.float64) for x in (s, t, w))
    for at in np.ndindex(s.shape):
        step = np.zeros_like(s)
        step[at] = 1e-6
        slope = (reference(s + step, t, w)[0] - reference(s - step, t, w)[0]) / 2e-6
        assert found[at] == pytest.approx(slope, rel=1e-3, abs=2e-6)


def channels_last(x):
    return np.moveaxis(x, 1, -1).reshape(len(x), *(x.shape[2:] or (1, 1)), x.shape[1])


@pytest.mark.parametrize("name", ["kd00", "kd01", "kd02", "kd03"])
def test_logits_equal_the_public_code(oracle, name):
    arrays, description = oracle("rkd")
    s, t, wanted = (channels_last(arrays[f"{name}/{k}"]) for k in ("y_s", "y_t", "grad_y_s"))
    weights = np.ones(s.shape[:3], np.float32)
    # The public code divides by images, not by pixels.
    pixels = s.shape[1] * s.shape[2]
    loss = partial(logit_distillation, temperature=description["cases"][name]["T"])
    assert value(loss(s, t, weights)) * pixels == pytest.approx(float(arrays[f"{name}/loss"]), rel=1e-5, abs=1e-7)
    found, _ = gradients(loss, s, t, weights)
    np.testing.assert_allclose(found / len(s), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["fitnet00", "fitnet01"])
def test_squared_equals_the_public_code(oracle, name):
    arrays, _ = oracle("rkd")
    s, t, wanted = (channels_last(arrays[f"{name}/{k}"]) for k in ("f_s", "f_t", "grad_f_s"))
    weights = np.ones(s.shape[:3], np.float32)
    loss = partial(feature_loss, kind="squared")
    assert value(loss(s, t, weights)) == pytest.approx(float(arrays[f"{name}/loss"]), rel=1e-5, abs=1e-7)
    found, _ = gradients(loss, s, t, weights)
    np.testing.assert_allclose(found / weights.sum(), wanted, rtol=1e-3, atol=1e-6)


def test_normalised_is_two_minus_two_cosines_whatever_the_lengths():
    s, t, w = case(2)
    cosine = (norm64(s.astype(np.float64)) * norm64(t.astype(np.float64))).sum(-1)
    assert value(feature_loss(s, t, w)) == pytest.approx(((2 - 2 * cosine) * w).sum() / w.sum(), rel=1e-5)
    lengths = np.random.default_rng(0).uniform(0.1, 9, w.shape)[..., None].astype(np.float32)
    assert value(feature_loss(s * lengths, t / lengths, w)) == pytest.approx(value(feature_loss(s, t, w)), rel=1e-5)
    unrelated = np.random.default_rng(1).standard_normal((2, 1, 64, 64, 128)).astype(np.float32)
    assert value(feature_loss(*unrelated, np.ones((1, 64, 64)))) == pytest.approx(2, abs=0.02), "a sum over channels"


def test_a_vector_of_zeros_has_no_direction():
    s, t, w = np.zeros((1, 1, 2, 3), np.float32), np.ones((1, 1, 2, 3), np.float32), np.ones((1, 1, 2), np.float32)
    t[0, 0, 1] = 0
    np.testing.assert_allclose(feature_loss(s, t, w), (1, 2))
    found, _ = gradients(feature_loss, s, t, w)
    assert not found.any()
    assert np.isfinite(jax.grad(lambda s: feature_loss(s, t, w)[0])(jnp.full_like(s, 1e-30))).all()


@each_loss
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_tiling_and_the_order_of_pixels_change_nothing(loss, seed):
    s, t, w = case(seed)
    wanted = value(loss(s, t, w))
    tiled = loss(np.tile(s, (1, 2, 2, 1)), np.tile(t, (1, 2, 2, 1)), np.tile(w, (1, 2, 2)))
    assert value(tiled) == pytest.approx(wanted, rel=2e-5)
    order = np.random.default_rng(seed).permutation(30)
    mixed = (x.reshape(3, 30, -1)[:, order].reshape(x.shape) for x in (s, t, w))
    assert value(loss(*mixed)) == pytest.approx(wanted, rel=2e-5)


def test_order_over_images_matters_to_channels_alone():
    """Per pixel a batch is a bag of pixels; a channel's softmax is over one image."""
    s, t, w = case(5)
    order = np.random.default_rng(0).permutation(90)
    mixed = [x.reshape(90, -1)[order].reshape(x.shape) for x in (s, t, w)]
    for name, (loss, _) in LOSSES.items():
        same = value(loss(*mixed)) == pytest.approx(value(loss(s, t, w)), rel=1e-4)
        assert same == (name != "channels")


@each_loss
def test_a_factor_on_the_weights_cancels_and_weights_count(loss):
    s, t, w = case(3)
    assert value(loss(s, t, 7 * w)) == pytest.approx(value(loss(s, t, w)), rel=1e-5)
    assert value(loss(s, t, w > 0)) != pytest.approx(value(loss(s, t, w)), rel=1e-3)
    # A pixel of weight 2 is two pixels.
    twice = [np.concatenate([x, x[:, :1]], 1) for x in (s, t, w)]
    w = w.copy()
    w[:, 0] *= 2
    assert value(loss(*twice)) == pytest.approx(value(loss(s, t, w)), rel=1e-5)


@each_loss
@pytest.mark.parametrize("bad", [1e30, -1e30, np.nan, np.inf, -np.inf])
def test_what_is_ignored_may_be_anything(loss, bad):
    s, t, w = case()
    broken = [np.where(w[..., None] > 0, x, np.float32(bad)) for x in (s, t)]
    np.testing.assert_array_equal(loss(*broken, w), loss(s, t, w))
    found, _ = gradients(loss, *broken, w)
    assert np.isfinite(found).all()
    assert not found[w == 0].any()
    assert (np.abs(found[w > 0]).max(-1) > 0).all()


@each_loss
def test_no_pixel_is_zero_over_zero(loss):
    s, t, w = case()
    assert tuple(map(float, loss(s, t, 0 * w))) == (0, 0)
    found, _ = gradients(loss, s, t, 0 * w)
    assert not found.any()
    by_weight = jax.grad(lambda w: loss(s, t, w)[0])(jnp.zeros_like(w))
    assert np.isfinite(by_weight).all()


@each_loss
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_equal_inputs_cost_nothing(loss, scale):
    s, _, w = case(scale=scale)
    assert float(loss(s, s, w)[0]) == pytest.approx(0, abs=1e-6)
    found, _ = gradients(loss, s, s, w)
    # Directions do not change with the length, so their gradient grows as lengths shrink.
    assert np.abs(found).max() * min(scale or 1, 1) < 1e-6


@each_loss
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_values_are_finite(loss, scale):
    s, t, w = case()
    found, _ = gradients(loss, scale * np.sign(s), scale * np.sign(t), w)
    assert np.isfinite(found).all()
    assert np.isfinite(loss(scale * np.sign(s), scale * np.sign(t), w)).all()


@each_loss
def test_the_teacher_learns_nothing_and_weights_do(loss):
    s, t, w = case()
    ours, theirs = gradients(loss, s, t, w)
    assert not theirs.any()
    assert ours.any()
    assert np.asarray(jax.grad(lambda w: loss(s, t, w)[0])(w)).any(), "nothing else is stopped"


@each_loss
def test_microbatches_add_up(loss):
    s, t, w = case(b=6)
    parts = [loss(*(x[i : i + 3] for x in (s, t, w))) for i in (0, 3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), loss(s, t, w), rtol=1e-6)


@each_loss
def test_half_precision_is_computed_in_float32(loss):
    half = [jnp.asarray(x, jnp.bfloat16) for x in case(b=2, h=32, w=32)]
    total, weight = loss(*half)
    assert total.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose((total, weight), loss(*(x.astype(jnp.float32) for x in half)), rtol=1e-6)


@each_loss
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_eight_devices_give_the_loss_of_the_global_batch(loss, shape):
    args = case(7, b=8, h=8)

    def step(s, t, w):
        (total, weight), gradient = jax.value_and_grad(lambda s: loss(s, t, w), has_aux=True)(s)
        return total, weight, gradient

    alone = step(*args)
    mesh = jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(args, NamedSharding(mesh, P("data", "space")))
    for found, wanted in zip(jax.jit(step)(*placed), alone, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="no kind of feature loss is called 'cosine'"):
        feature_loss(*case(), kind="cosine")
