"""What the network sees: order of channels, normalisation, derived channels, and windows against whole scenes."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from augment.fake_batch import make_batch, make_spec

from sarjax.augment import inputs as module
from sarjax.augment.inputs import channel_count, channel_names, has_data, tile_statistics
from sarjax.config import Inputs
from sarjax.errors import UserError
from sarjax.spec import BandStatistics, Statistics

local_mean = jax.jit(module.local_mean, static_argnums=2)
SPEC = make_spec()
STATISTICS = Statistics(
    {
        "sar": BandStatistics((100.0, 50.0), (20.0, 10.0), (0.0,) * 2, (255.0,) * 2, 10),
        "optical": BandStatistics((10.0, 20.0, 30.0), (1.0, 2.0, 0.0), (0.0,) * 3, (255.0,) * 3, 10),
    },
    (1, 1, 1),
    {},
    {},
)


def network_inputs(batch, inputs, spec, statistics):
    f = jax.jit(lambda batch: module.network_inputs(batch, inputs, spec, statistics))
    return f(batch)


TILE = Inputs(normalisation="tile")


def test_dataset_normalisation_and_channel_order(batch):
    inputs = Inputs(("optical", "sar"))
    out = np.asarray(network_inputs(batch, inputs, SPEC, STATISTICS))
    names = channel_names(inputs, SPEC)
    assert names[:4] == ("optical[0].red", "optical[0].green", "optical[0].blue", "optical[1].red")
    assert names[6:] == ("sar[0].VV", "sar[0].VH", "sar[1].VV", "sar[1].VH")
    assert out.shape == (8, 16, 16, 10)
    assert out.dtype == np.float32
    keep = batch["sar_valid"][:, 1] > 0
    expected = np.where(keep, (batch["sar"][:, 1, :, :, 1] - 50.0) / 10, 0)
    np.testing.assert_allclose(out[..., names.index("sar[1].VH")], expected, atol=1e-5)
    # a std of 0 is floored at 1e-3 |mean|
    blue = np.where(batch["optical_valid"][:, 0] > 0, (batch["optical"][:, 0, :, :, 2] - 30.0) / 0.03, 0)
    np.testing.assert_allclose(out[..., 2], blue, rtol=1e-5)


def test_tile_normalisation(batch):
    out = np.asarray(network_inputs(batch, TILE, SPEC, None))
    assert np.isfinite(out).all()
    # no data, one valid pixel, constant
    assert not out[0].any()
    np.testing.assert_allclose(out[1:3], 0, atol=1e-4)
    for row in range(3, 8):
        for date in range(2):
            keep = batch["sar_valid"][row, date] > 0
            x = batch["sar"][row, date][keep].astype(np.float64)
            got = out[row, :, :, 2 * date : 2 * date + 2]
            np.testing.assert_allclose(got[keep], (x - x.mean(0)) / x.std(0), atol=1e-5)
            assert not got[~keep].any()


@pytest.mark.parametrize("value", [77.0, 1e-4, -13.3, 60000.1])
def test_a_constant_image_is_zero_whatever_its_level(value):
    batch = make_batch(2, dtype="float32")
    batch["sar"][:] = value
    batch["sar_valid"][:] = 1
    out = np.asarray(network_inputs(batch, TILE, make_spec(dtype="float32"), None))
    assert np.abs(out).max() < 1e-3


def test_tile_statistics_are_right_in_float32_for_large_images():
    r = np.random.default_rng(0)
    image = (20000 + 3 * r.standard_normal((1, 1500, 1000, 1))).astype(np.float32)
    mean, std = tile_statistics(image, np.ones((1, 1500, 1000), np.uint8))
    exact = image.astype(np.float64)
    assert mean[0, 0] == pytest.approx(exact.mean(), abs=0.01)
    assert std[0, 0] == pytest.approx(exact.std(), rel=1e-3)


def brute_mean(x, valid, side):
    before, after = (side - 1) // 2, side // 2
    out = np.zeros(x.shape)
    for i, j in np.ndindex(valid.shape):
        if valid[i, j]:
            box = np.s_[max(0, i - before) : i + after + 1, max(0, j - before) : j + after + 1]
            out[i, j] = x[box][valid[box] > 0].mean(0)
    return out


@pytest.mark.parametrize("side", [1, 2, 3, 7, 40])
def test_local_mean_against_boxes(side):
    r = np.random.default_rng(side)
    x = r.standard_normal((9, 13, 2)).astype(np.float32)
    valid = (r.random((9, 13)) > 0.3).astype(np.uint8)
    np.testing.assert_allclose(local_mean(x, valid, side), brute_mean(x, valid, side), atol=1e-5)


def test_derived_channels(batch):
    inputs = dataclasses.replace(TILE, local_mean=3, date_difference=True)
    names = channel_names(inputs, SPEC)
    assert names[4:8] == tuple(f"{n} mean 3" for n in names[:4])
    assert names[8:] == ("sar.VV mean 3 difference", "sar.VH mean 3 difference")
    out = np.asarray(network_inputs(batch, inputs, SPEC, None))
    assert out.shape[-1] == channel_count(inputs, SPEC) == 10
    row = 4
    for date in range(2):
        expected = brute_mean(out[row, :, :, 2 * date : 2 * date + 2], batch["sar_valid"][row, date], 3)
        np.testing.assert_allclose(out[row, :, :, 4 + 2 * date : 6 + 2 * date], expected, atol=1e-5)
    both = (batch["sar_valid"][:, 0] & batch["sar_valid"][:, 1]) > 0
    np.testing.assert_allclose(out[..., 8:], np.where(both[..., None], out[..., 6:8] - out[..., 4:6], 0), atol=1e-6)
    plain = np.asarray(network_inputs(batch, dataclasses.replace(TILE, date_difference=True), SPEC, None))
    assert channel_names(dataclasses.replace(TILE, date_difference=True), SPEC)[4] == "sar.VV difference"
    np.testing.assert_allclose(
        plain[..., 4:], np.where(both[..., None], plain[..., 2:4] - plain[..., :2], 0), atol=1e-6
    )


def test_chosen_dates_and_repeated_channels(batch):
    inputs = dataclasses.replace(TILE, dates=(1,), repeat=5)
    out = np.asarray(network_inputs(batch, inputs, SPEC, None))
    whole = np.asarray(network_inputs(batch, TILE, SPEC, None))
    assert channel_names(inputs, SPEC) == ("sar[1].VV", "sar[1].VH", "sar[1].VV", "sar[1].VH", "sar[1].VV")
    np.testing.assert_allclose(out, whole[..., [2, 3, 2, 3, 2]], atol=1e-5)
    # dates in the order asked for: the difference then is first minus second
    turned = network_inputs(batch, dataclasses.replace(TILE, dates=(1, 0), date_difference=True), SPEC, None)
    straight = network_inputs(batch, dataclasses.replace(TILE, date_difference=True), SPEC, None)
    np.testing.assert_allclose(turned[..., 4:], -np.asarray(straight)[..., 4:], atol=1e-6)


def test_windows_of_a_scene_equal_the_whole_scene():
    """One statistic over the scene; the local mean needs its margin."""
    inputs = dataclasses.replace(TILE, local_mean=5, date_difference=True)
    scene = make_batch(1, h=40, w=56, seed=3)
    scene["sar_valid"] = (np.random.default_rng(0).random((1, 2, 40, 56)) > 0.2).astype(np.uint8)
    statistics = tile_statistics(scene["sar"], scene["sar_valid"])
    whole = np.asarray(network_inputs(scene, inputs, SPEC, None))
    at = np.s_[:, :, 8:32, 16:48]
    window = {"sar": scene["sar"][at], "sar_valid": scene["sar_valid"][at]}
    of_scene = {"sar_mean": statistics.mean, "sar_std": statistics.std}
    out = np.asarray(network_inputs(window | of_scene, inputs, SPEC, None))
    sliced = whole[:, 8:32, 16:48]
    np.testing.assert_allclose(out[..., :4], sliced[..., :4], atol=1e-6)
    np.testing.assert_allclose(out[:, 2:-2, 2:-2], sliced[:, 2:-2, 2:-2], atol=1e-6)
    own = np.asarray(network_inputs(window, inputs, SPEC, None))
    assert np.abs(own[..., :4] - sliced[..., :4]).max() > 1e-3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Inputs(("lidar",)), r"'lidar'.*'toy'.*'sar', 'optical'"),
        (Inputs(("sar", "lidar")), r"'lidar'.*'toy'"),
        (Inputs(dates=(0, 2)), r"date 2.*'toy' has 2"),
        (Inputs(dates=(-1,)), r"date -1"),
        (Inputs(dates=()), r"dates is empty"),
        (Inputs(()), r"modalities is empty"),
        (Inputs(dates=(1,), date_difference=True), r"two dates.*date 1.*'toy'"),
        (Inputs(repeat=3), r"repeat is 3.*4 channels"),
        (Inputs(local_mean=-1), r"local_mean is -1"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(inputs, message, batch):
    with pytest.raises(UserError, match=message):
        channel_count(inputs, SPEC)
    with pytest.raises(UserError, match=message):
        network_inputs(batch, inputs, SPEC, STATISTICS)


def test_a_batch_without_the_modality(batch):
    del batch["sar"]
    with pytest.raises(UserError, match=r"'sar'.*optical"):
        network_inputs(batch, Inputs(), SPEC, STATISTICS)


def test_what_is_stored_without_data_does_not_matter(batch):
    inputs = dataclasses.replace(TILE, local_mean=3, date_difference=True)
    noise = np.random.default_rng(9).integers(0, 255, batch["sar"].shape).astype(np.uint8)
    other = dict(batch, sar=np.where(batch["sar_valid"][..., None] > 0, batch["sar"], noise))
    f = jax.jit(lambda b: module.network_inputs(b, inputs, SPEC, None))
    assert np.array_equal(f(batch), f(other))


def test_has_data_where_every_sensor_has_it_at_every_date():
    """Holes of each sensor and each date in places of their own."""
    spec = SimpleNamespace(dates=2, name="two dates")
    batch = {f"{m}_valid": np.ones((1, 2, 1, 5), np.uint8) for m in ("sar", "optical")}
    for place, (m, date) in enumerate((m, date) for m in ("sar", "optical") for date in (0, 1)):
        batch[f"{m}_valid"][0, date, 0, place] = 0
    for modalities, dates, expected in (
        (("sar",), "all", [0, 0, 1, 1, 1]),
        (("sar", "optical"), "all", [0, 0, 0, 0, 1]),
        (("optical",), (1,), [1, 1, 1, 0, 1]),
        (("optical", "sar"), (0,), [0, 1, 0, 1, 1]),
    ):
        found = has_data(batch, Inputs(modalities=modalities, dates=dates), spec)
        np.testing.assert_array_equal(found, [[expected]])


def test_dates_one_after_another(batch):
    """With `by_date`: all channels of a date, its means too, then the next date's; `repeat` is of each."""
    inputs = Inputs(("optical", "sar"), local_mean=3, by_date=True)
    names = channel_names(inputs, SPEC)
    first = ("optical[0].red", "optical[0].green", "optical[0].blue", "sar[0].VV", "sar[0].VH")
    means = tuple(f"{name} mean 3" for name in first)
    assert names == (*first, *means, *(n.replace("[0]", "[1]") for n in (*first, *means)))
    plain_inputs = dataclasses.replace(inputs, by_date=False)
    plain = np.asarray(network_inputs(batch, plain_inputs, SPEC, STATISTICS))
    order = [channel_names(plain_inputs, SPEC).index(name) for name in names]
    np.testing.assert_array_equal(network_inputs(batch, inputs, SPEC, STATISTICS), plain[..., order])
    repeated = dataclasses.replace(inputs, modalities=("sar",), local_mean=0, repeat=3)
    names = ("sar[0].VV", "sar[0].VH", "sar[0].VV", "sar[1].VV", "sar[1].VH", "sar[1].VV")
    assert channel_names(repeated, SPEC) == names
    order = [channel_names(plain_inputs, SPEC).index(name) for name in names]
    np.testing.assert_array_equal(network_inputs(batch, repeated, SPEC, STATISTICS), plain[..., order])
    assert channel_count(repeated, SPEC) == 6
    with pytest.raises(UserError, match="joins the dates"):
        channel_names(dataclasses.replace(inputs, date_difference=True), SPEC)
    with pytest.raises(UserError, match=r"inputs.repeat is 1, but there are 2"):
        channel_names(dataclasses.replace(repeated, repeat=1), SPEC)
