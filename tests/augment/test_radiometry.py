"""Noise has the moments that physics gives it, and stays off what has no physics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment.fake_batch import make_batch, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gamma, kstest

from sarjax.augment import radiometry as module
from sarjax.config import Augment

radiometry = jax.jit(module.radiometry, static_argnums=(2, 3))
unit_gamma = jax.jit(module.unit_gamma, static_argnums=(1, 2))
OFF = Augment(flip=False, rotate=False)


@pytest.mark.parametrize("looks", [0.5, 1.0, 2.7, 4.0, 6.0, 25.0])
def test_gamma_has_the_moments_of_speckle(looks, key):
    g = np.asarray(unit_gamma(key, looks, (400_000,)), np.float64)
    assert g.min() > 0
    assert np.isfinite(g).all()
    # mean, variance and third central moment of Gamma(L, 1/L): 1, 1/L, 2/L^2
    sigma = (1 / looks / len(g)) ** 0.5
    assert abs(g.mean() - 1) < 5 * sigma
    assert g.var() == pytest.approx(1 / looks, rel=0.03)
    assert ((g - 1) ** 3).mean() == pytest.approx(2 / looks**2, rel=0.15)


@pytest.mark.parametrize("looks", [0.5, 1.0, 1.5, 3.0, 4.0, 6.0, 7.0])
def test_gamma_is_distributed_as_one(looks, key):
    g = np.asarray(unit_gamma(key, looks, (200_000,)), np.float64)
    assert kstest(g, gamma(looks, scale=1 / looks).cdf).statistic < 0.005


@settings(max_examples=6, deadline=None)
@given(st.floats(1.0, 40.0), st.integers(0, 2**30))
def test_unit_mean_for_any_looks(looks, seed):
    g = module.unit_gamma(jax.random.key(seed), looks, (65536,))
    assert abs(float(jnp.mean(g)) - 1) < 6 * (1 / looks / 65536) ** 0.5


def flat(kind, value, looks=4.0):
    batch = make_batch(3, h=128, w=128, dtype="float32")
    batch["sar"][:] = value
    batch["sar_valid"][:] = 1
    batch["sar_valid"][0, 0, :3] = 0
    out = radiometry(batch, jax.random.key(1), Augment(speckle=looks), make_spec(kind, "float32"))
    return np.asarray(out["sar"], np.float64), batch


def test_intensity_keeps_its_mean():
    x, _ = flat("intensity", 10.0)
    x = x[1:]
    assert x.mean() == pytest.approx(10.0, rel=0.01)
    assert x.var() / x.mean() ** 2 == pytest.approx(1 / 4, rel=0.05)


def test_amplitude_keeps_its_mean_square():
    x, _ = flat("amplitude", 10.0)
    x = x[1:]
    assert (x**2).mean() == pytest.approx(100.0, rel=0.01)
    assert x.mean() < 9.95


def test_decibels_get_the_speckle_of_intensity():
    x, _ = flat("db", -12.0)
    linear = 10 ** (x[1:] / 10)
    assert linear.mean() == pytest.approx(10**-1.2, rel=0.01)
    intensity, _ = flat("intensity", 10**-1.2)
    np.testing.assert_allclose(linear, intensity[1:], rtol=1e-5)


def test_dates_bands_and_rows_are_speckled_independently():
    x, _ = flat("intensity", 1.0)
    layers = x[1:].transpose(0, 1, 4, 2, 3).reshape(8, -1)
    off_diagonal = np.corrcoef(layers) - np.eye(8)
    assert np.abs(off_diagonal).max() < 0.03


@pytest.mark.parametrize(
    ("kind", "dtype"), [("intensity", "uint16"), ("amplitude", "uint8"), ("db", "float32"), ("stretched", "uint8")]
)
def test_no_data_stays_zero_and_all_is_finite(kind, dtype, key):
    batch, spec = make_batch(dtype=dtype), make_spec(kind, dtype)
    out = radiometry(batch, key, Augment(speckle=2.0, jitter=0.3), spec)
    for name in ("sar", "optical"):
        x = np.asarray(out[name])
        assert x.dtype == np.float32
        assert np.isfinite(x).all()
        assert not x[batch[f"{name}_valid"] == 0].any()


def test_identity_only_converts(batch, key):
    out = radiometry(batch, key, OFF, make_spec())
    for name in ("sar", "optical"):
        assert np.array_equal(out[name], batch[name] * (batch[f"{name}_valid"][..., None] > 0))


def test_stretched_bands_are_never_speckled_and_sar_never_jittered(batch, key):
    speckled = radiometry(batch, key, Augment(speckle=1.0), make_spec("stretched"))
    plain = radiometry(batch, key, OFF, make_spec("stretched"))
    assert all(np.array_equal(speckled[n], plain[n]) for n in ("sar", "optical"))
    jittered = radiometry(batch, key, Augment(jitter=0.5), make_spec("intensity"))
    assert np.array_equal(jittered["sar"], plain["sar"])
    assert not np.array_equal(jittered["optical"], plain["optical"])


def test_jitter_is_one_affine_map_per_row_and_date(key):
    batch = make_batch(6, dtype="float32")
    batch["optical"] += 60
    out = radiometry(batch, key, Augment(jitter=0.2), make_spec("stretched", "float32"))
    slopes = np.zeros((6, 2))
    for row in range(1, 6):
        for date in range(2):
            keep = batch["optical_valid"][row, date] > 0
            found = []
            for band in range(3):
                x = batch["optical"][row, date, :, :, band][keep]
                y = np.asarray(out["optical"])[row, date, :, :, band][keep]
                slope, offset = np.polyfit(x, y, 1)
                np.testing.assert_allclose(slope * x + offset, y, rtol=1e-4)
                brightness = y.mean() / x.mean()
                assert 0.8 <= brightness <= 1.2
                assert 0.8 <= slope / brightness <= 1.2
                found.append((slope, brightness))
            np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-3)
            slopes[row, date] = found[0][0]
    assert len(np.unique(np.round(slopes[1:], 4))) == 10


def test_jitter_stays_within_what_can_be_stored(key):
    batch = make_batch(16)
    x = np.asarray(radiometry(batch, key, Augment(jitter=0.9), make_spec("stretched"))["sar"])
    assert x.min() == 0
    assert x.max() == 255


def test_missing_modalities_are_skipped_and_others_keep_their_draw(batch, key):
    options, spec = Augment(speckle=3.0, jitter=0.2), make_spec()
    whole = radiometry(batch, key, options, spec)
    part = radiometry({k: v for k, v in batch.items() if not k.startswith("sar")}, key, options, spec)
    assert "sar" not in part
    assert np.array_equal(part["optical"], whole["optical"])


def test_a_row_does_not_depend_on_its_neighbours(batch, key):
    options, spec = Augment(speckle=3.0, jitter=0.2), make_spec()
    whole = radiometry(batch, key, options, spec)
    part = radiometry({k: v[[6, 3]] for k, v in batch.items()}, key, options, spec)
    for name in ("sar", "optical"):
        np.testing.assert_allclose(part[name], np.asarray(whole[name])[[6, 3]], rtol=1e-6)
