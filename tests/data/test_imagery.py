"""Reading images: what is no data, what transforms give, and that neither depends on where one looks."""

import dataclasses
import warnings

import fake_data
import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning

from sarjax import raster
from sarjax.data import imagery
from sarjax.data.imagery import decibel, gaps, lee, margin, read_image, stored_dtype
from sarjax.errors import UserError
from sarjax.spec import BandSpec, ModalitySpec, Transform

H, W = 70, 90
LEE, DB = Transform("lee", "intensity", 5, 2.0), Transform("db", "intensity")
BANDS = (BandSpec("a", "intensity"), BandSpec("b", "intensity"))
PLAIN = ModalitySpec("sar", BANDS, "float32", no_data=0)
MODALITIES = {
    "no data": PLAIN,
    "gaps": dataclasses.replace(PLAIN, smallest_gap=12),
    "lee": dataclasses.replace(PLAIN, transforms=(LEE,)),
    "gaps and lee": dataclasses.replace(PLAIN, smallest_gap=12, transforms=(LEE,)),
    "gaps, two filters and db": dataclasses.replace(
        PLAIN, smallest_gap=12, transforms=(LEE, dataclasses.replace(LEE, window=3), DB)
    ),
}


def speckled(seed, shape=(H, W, 2)):
    """An intensity with NaN, bright targets, and crooked regions of 0 of all sizes, some at the border."""
    rng = np.random.default_rng(seed)
    image = rng.gamma(2.0, 1e-3, shape).astype(np.float32)
    image[rng.random(shape[:2]) < 0.002] = 1e4
    image[rng.random(shape[:2]) < 0.02, 0] = np.nan
    thread = np.cumsum(rng.integers(-1, 2, (3, shape[0])), 1) + rng.integers(10, shape[1] - 10, (3, 1))
    for columns in thread:
        image[np.arange(shape[0]), np.clip(columns, 0, shape[1] - 1)] = 0
    image[rng.random(shape[:2]) < 0.25] = 0
    image[30:40, 40:60] = 0
    image[-3:, -9:] = np.nan
    return image


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rasters")
    for seed in range(3):
        fake_data.write_tiff(folder / f"{seed}.tif", speckled(seed))
    return folder


@pytest.mark.parametrize("what", MODALITIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_part_is_the_same_as_that_part_of_the_whole(files, what, data):
    modality = MODALITIES[what]
    row, column = data.draw(st.integers(0, H - 1)), data.draw(st.integers(0, W - 1))
    height, width = data.draw(st.integers(1, H - row)), data.draw(st.integers(1, W - column))
    with raster.open_raster(files / f"{data.draw(st.integers(0, 2))}.tif") as f:
        whole, seen = read_image(f, modality, (0, 0, H, W))
        image, valid = read_image(f, modality, (row, column, height, width))
    part = slice(row, row + height), slice(column, column + width)
    np.testing.assert_array_equal(valid, seen[part])
    np.testing.assert_array_equal(image, whole[part])  # to the bit


def test_the_regions_of_these_images_are_of_all_sizes(files):
    """Else the test above would show nothing of gaps."""
    with raster.open_raster(files / "0.tif") as f:
        masks = [read_image(f, MODALITIES[what], (0, 0, H, W))[1] for what in ("no data", "gaps")]
    assert (masks[1] & ~masks[0]).mean() > 0.01
    assert (~masks[1]).mean() > 0.05


def slow_lee(image, valid, window, square):
    """The formula, pixel by pixel, by means over lists; the scene's edge is reflected."""
    h, w, bands = image.shape
    reach = window // 2
    out = np.zeros((h, w, bands))
    reflected = lambda i, n: i if 0 <= i < n else (-i - 1 if i < 0 else 2 * n - 1 - i)  # noqa: E731
    for c in range(bands):
        filled = np.zeros((h, w))
        for y in range(h):
            for x in range(w):
                near = [
                    float(image[v, u, c])
                    for v in range(max(0, y - reach), min(h, y + reach + 1))
                    for u in range(max(0, x - reach), min(w, x + reach + 1))
                    if valid[v, u]
                ]
                filled[y, x] = float(image[y, x, c]) if valid[y, x] else (sum(near) / len(near) if near else 0.0)
        for y in range(h):
            for x in range(w):
                values = np.array(
                    [
                        filled[reflected(v, h), reflected(u, w)]
                        for v in range(y - reach, y + reach + 1)
                        for u in range(x - reach, x + reach + 1)
                    ]
                )
                mean = values.mean()
                variance = ((values - mean) ** 2).mean()
                k = max(0.0, 1 - square * mean**2 / variance) if variance > 0 else 0.0
                out[y, x, c] = mean + k * (filled[y, x] - mean)
    return out


@pytest.mark.parametrize(("window", "looks"), [(3, 1.0), (7, 4.0), (5, 0.8)])
@pytest.mark.parametrize("quantity", ["intensity", "amplitude"])
def test_lee_is_its_formula(window, looks, quantity):
    rng = np.random.default_rng([window, int(looks * 10), len(quantity)])
    image = rng.gamma(looks, 1 / looks, (19, 23, 2)).astype(np.float32) * np.float32([1, 300])
    image[5:9, 5:12] *= 9
    image[12, 3] *= 1000
    valid = rng.random((19, 23)) > 0.1
    valid[:6, 14:] = False  # a hole wider than the window
    image[~valid] = np.where(rng.random((np.sum(~valid), 2)) < 0.5, np.nan, -5)
    square = (1.0 if quantity == "intensity" else 4 / np.pi - 1) / looks
    found, seen = lee(image, valid, Transform("lee", quantity, window, looks))
    assert found.dtype == np.float32
    assert seen is valid
    wanted = slow_lee(image, valid, window, square)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_lee_smooths_speckle_and_keeps_edges():
    rng = np.random.default_rng(0)
    truth = np.where(np.arange(120) < 60, 1.0, 20.0) * np.ones((120, 1))
    image = (truth * rng.gamma(4, 1 / 4, truth.shape)).astype(np.float32)[..., None]
    found, _ = lee(image, np.ones(truth.shape, bool), Transform("lee", "intensity", 7, 4.0))
    flat = found[10:-10, 10:50, 0]
    assert flat.std() < 0.45 * image[10:-10, 10:50, 0].std()
    np.testing.assert_allclose(flat.mean(), 1, atol=0.03)
    # A blur of this window would mix half and half beside the edge.
    assert found[10:-10, 58, 0].mean() < 7


def test_lee_of_a_constant_is_that_constant():
    image = np.full((20, 20, 1), 3.7, np.float32)
    np.testing.assert_array_equal(lee(image, np.ones((20, 20), bool), LEE)[0], image)
    assert not lee(image * 0, np.ones((20, 20), bool), LEE)[0].any()
    assert np.isfinite(lee(image, np.zeros((20, 20), bool), LEE)[0]).all()


@pytest.mark.parametrize(("quantity", "factor"), [("intensity", 10), ("amplitude", 20)])
def test_decibels(quantity, factor):
    image = np.float32([[[1, 10], [100, 0.1], [0, 5], [-3, 5], [4, 4]]])
    valid = np.array([[True, True, True, True, False]])
    found, seen = decibel(image, valid, Transform("db", quantity))
    assert seen.tolist() == [[True, True, False, False, False]]
    np.testing.assert_allclose(found[0, :2], factor * np.float32([[0, 1], [2, -1]]), atol=1e-5)
    assert np.isfinite(found).all()


def test_gaps_are_connected_also_by_corners():
    mask = np.zeros((9, 9), bool)
    mask[[0, 1, 2, 3], [0, 1, 2, 3]] = True  # a diagonal of 4
    mask[7, 5:8] = True
    assert gaps(mask, 1) is mask
    assert gaps(mask, 4).sum() == 4
    assert gaps(mask, 3).sum() == 7
    assert not gaps(mask, 5).any()
    assert not gaps(np.zeros((3, 3), bool), 5).any()


def test_margins():
    assert [margin(MODALITIES[what]) for what in MODALITIES] == [0, 12, 4, 16, 18]
    assert margin(dataclasses.replace(PLAIN, no_data=None, smallest_gap=12)) == 0


class TestValid:
    def read(self, tmp_path, image, modality, **profile):
        fake_data.write_tiff(tmp_path / "x.tif", image)
        if profile:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(tmp_path / "x.tif", "r+") as f:
                    f.nodata = profile["nodata"]
        with raster.open_raster(tmp_path / "x.tif") as f:
            return read_image(f, modality, (0, 0, *image.shape[:2]))

    def test_all_bands_have_to_hold_the_value(self, tmp_path):
        image = np.uint8([[[0, 0], [0, 3], [4, 4]]])
        modality = ModalitySpec("optical", BANDS, "uint8", no_data=0)
        found, valid = self.read(tmp_path, image, modality)
        assert valid.tolist() == [[False, True, True]]
        np.testing.assert_array_equal(found, image)

    def test_nothing_is_no_data_unless_said(self, tmp_path):
        assert self.read(tmp_path, np.zeros((1, 3, 2), np.uint8), ModalitySpec("optical", BANDS))[1].all()

    @pytest.mark.parametrize(("dtype", "wanted"), [("uint16", [False, True, True]), ("float32", [False, False, True])])
    def test_what_the_file_declares(self, tmp_path, dtype, wanted):
        """Whole numbers: a band may happen to hold the value; real ones do not happen to."""
        image = np.array([[[9, 9], [9, 3], [4, 4]]], dtype)
        found, valid = self.read(tmp_path, image, ModalitySpec("sar", BANDS, dtype), nodata=9)
        assert valid[0].tolist() == wanted
        assert found[0, 0].tolist() == [0, 0]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number(self, tmp_path, bad):
        image = np.float32([[[1, bad], [2, 3]]])
        found, valid = self.read(tmp_path, image, ModalitySpec("sar", BANDS, "float32"))
        assert valid.tolist() == [[False, True]]
        assert found.tolist() == [[[0, 0], [2, 3]]]

    def test_int16_keeps_its_sign(self, tmp_path):
        found, _ = self.read(tmp_path, np.int16([[[-32768, 32767]]]), ModalitySpec("sar", BANDS, "float32"))
        assert (found.dtype, found.tolist()) == (np.float32, [[[-32768, 32767]]])


def test_dtypes():
    kept = {"uint8": "uint8", "uint16": "uint16", "int8": "float32", "int16": "float32", "float32": "float32"}
    assert {name: stored_dtype(name) for name in kept} == kept
    for name in ("float64", "int32", "uint32", "complex64"):
        with pytest.raises(UserError, match=f"{name} numbers cannot be kept: uint8, uint16, int16 and float32"):
            stored_dtype(name)


def test_transforms_take_any_numbers():
    info = raster.Info(9, 9, 2, "float64", None, raster.NOWHERE)
    with pytest.raises(UserError, match="x does not fit: float64 numbers cannot be kept"):
        imagery.check_image("x", info, PLAIN)
    imagery.check_image("x", info, MODALITIES["lee"])
    with pytest.raises(UserError, match="x has 3 bands, but 2 of sar are expected: a, b"):
        imagery.check_image("x", info._replace(bands=3), MODALITIES["lee"])
