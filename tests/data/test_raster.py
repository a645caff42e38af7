"""Rasters: round trips, windows, and one sentence for every broken file."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import fake_data
import numpy as np
import pytest
from PIL import Image

from sarjax import raster
from sarjax.errors import UserError


@pytest.mark.parametrize("name", ["a b.tif", "ü.png"])
@pytest.mark.parametrize("bands", [1, 3])
def test_what_is_written_is_read(tmp_path, name, bands):
    image = np.random.default_rng(0).integers(0, 256, (30, 41, bands), dtype=np.uint8)
    path = raster.write(tmp_path / name, image)
    assert raster.size(path) == (30, 41, bands)
    np.testing.assert_array_equal(raster.read(path), image)
    np.testing.assert_array_equal(raster.read(path, (3, 5, 7, 11)), image[3:10, 5:16])
    assert os.listdir(tmp_path) == [name]


def test_two_dimensions_and_floats(tmp_path):
    image = np.linspace(-30, 5, 12, dtype=np.float32).reshape(3, 4)
    assert raster.read(raster.write(tmp_path / "db.tif", image)).dtype == np.float32
    np.testing.assert_array_equal(raster.read(tmp_path / "db.tif")[..., 0], image)


def test_a_raster_without_georeference_is_no_matter(tmp_path):
    fake_data.write_tiff(tmp_path / "x.tif", np.zeros((4, 4), np.uint8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        raster.read(tmp_path / "x.tif")
        raster.size(tmp_path / "x.tif")
    assert not said


def test_broken_files_are_named(tmp_path):
    whole = tmp_path / "whole.tif"
    fake_data.write_tiff(whole, np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8))
    (tmp_path / "empty.tif").touch()
    (tmp_path / "short.tif").write_bytes(whole.read_bytes()[:20_000])
    (tmp_path / "text.tif").write_text("no image")
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for name in ("short.png", "short.jpg"):
        Image.fromarray(image).save(tmp_path / name)
        raster.read(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    for name, cause in {
        "gone.tif": "does not exist",
        "empty.tif": r"is empty \(0 bytes\)",
        "short.tif": "cannot be read",
        "short.png": "it is truncated",
        "short.jpg": "it is truncated",
        "text.tif": "cannot be read: it is no image; TIFF, PNG and JPEG are accepted",
    }.items():
        with pytest.raises(UserError, match=cause) as e:
            raster.read(tmp_path / name)
        assert str(tmp_path / name) in str(e.value)
        assert "\n" not in str(e.value)


def test_a_file_that_points_to_others_is_no_image(tmp_path):
    """GDAL would follow it, to other folders and to the network."""
    secret = tmp_path / "secret.tif"
    fake_data.write_tiff(secret, np.ones((4, 4), np.uint8))
    (tmp_path / "x.tif").write_text(
        f'<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        "</VRTDataset>"
    )
    with pytest.raises(UserError, match=r"x\.tif cannot be read: it is no image"):
        raster.read(tmp_path / "x.tif")


def test_a_block_of_many_bands_counts_as_a_whole(tmp_path, monkeypatch):
    fake_data.write_tiff(tmp_path / "x.tif", np.zeros((64, 64, 4), np.uint8))
    monkeypatch.setattr(raster, "MOST_BLOCK_BYTES", 32 * 64 * 4 - 1)
    with pytest.raises(UserError, match="is stored in blocks of 64 x 32"):
        raster.read(tmp_path / "x.tif")
    monkeypatch.setattr(raster, "MOST_BLOCK_BYTES", 32 * 64 * 4)
    assert raster.read(tmp_path / "x.tif").shape == (64, 64, 4)


def test_a_window_lies_inside(tmp_path):
    fake_data.write_tiff(tmp_path / "x.tif", np.zeros((10, 20), np.uint8))
    for window in ((0, 0, 11, 5), (0, 16, 5, 5), (-1, 0, 5, 5)):
        with pytest.raises(UserError, match=r"x.tif is 20 x 10 pixels, too small for the window"):
            raster.read(tmp_path / "x.tif", window)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/x.tif: .*a writable folder with room for it"):
        raster.write(tmp_path / "gone" / "x.tif", np.zeros((4, 4), np.uint8))


def test_tags_and_silence(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with raster.create(tmp_path / "x.tif", 30, 40, 1, "uint8", tags={"MADE": "here"}) as f:
            f.write((0, 0, 30, 40), np.ones((30, 40), np.uint8))
        with raster.open_raster(tmp_path / "x.tif") as f:
            assert f.tags()["MADE"] == "here"
            assert f.read().all()
            assert f.thumbnail(8).shape == (6, 8, 1)
    assert not said


@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint8"), (5, "float32")])
def test_a_file_that_the_disk_cut_off_does_not_appear(tmp_path, monkeypatch, bands, dtype):
    """GDAL's closing says nothing of it."""
    path, whole = tmp_path / "x.tif", raster._check_whole
    image = np.random.default_rng(0).integers(0, 255, (600, 700, bands)).astype(dtype)

    def cut_off(written, final):
        os.truncate(written, written.stat().st_size - 100)
        whole(written, final)

    monkeypatch.setattr(raster, "_check_whole", cut_off)
    with (
        pytest.raises(UserError, match=r"cannot write .*x\.tif: .*the disk.*may be full"),
        raster.create(path, 600, 700, bands, dtype) as f,
    ):
        f.write((0, 0, 600, 700), image)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(raster, "_check_whole", whole)
    with raster.create(path, 600, 700, bands, dtype) as f:
        f.write((0, 0, 300, 700), image[:300])  # what is never written is filled up, and whole
    np.testing.assert_array_equal(raster.read(path)[:300], image[:300])
    assert not raster.read(path)[300:].any()


def test_reading_and_writing_in_threads_at_once(tmp_path):
    """Files of several bands, in small parts, under a cache that is soon full."""
    rng = np.random.default_rng(0)
    source = rng.integers(1, 255, (900, 900, 4), dtype=np.uint8)
    fake_data.write_tiff(tmp_path / "source.tif", source)
    image = rng.random((400, 420, 7), dtype=np.float32)
    stop = threading.Event()

    def keep_reading():
        with raster.open_raster(tmp_path / "source.tif") as f:
            while not stop.is_set():
                y, x = rng.integers(0, 700, 2)
                np.testing.assert_array_equal(f.read((y, x, 200, 200)), source[y : y + 200, x : x + 200])

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(keep_reading)
        with raster.create(tmp_path / "x.tif", 400, 420, 7, "float32") as f:
            for y in range(0, 400, 33):
                for x in range(0, 420, 37):
                    part = image[y : y + 33, x : x + 37]
                    f.write((y, x, *part.shape[:2]), part)
        stop.set()
        reading.result()
    np.testing.assert_array_equal(raster.read(tmp_path / "x.tif"), image)


def test_a_limit_that_is_no_number(tmp_path, monkeypatch):
    fake_data.write_tiff(tmp_path / "x.tif", np.zeros((4, 4), np.uint8))
    monkeypatch.setenv("SARJAX_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="SARJAX_MAX_PIXELS is 'many', but should be a whole number"):
        raster.read(tmp_path / "x.tif")
    monkeypatch.setenv("SARJAX_MAX_PIXELS", "15")
    with pytest.raises(UserError, match="declares 4 x 4 pixels in 1 bands, more than 15"):
        raster.read(tmp_path / "x.tif")
    monkeypatch.setenv("SARJAX_MAX_PIXELS", "16")
    assert raster.size(tmp_path / "x.tif") == (4, 4, 1)
