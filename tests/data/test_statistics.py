"""Statistics against numpy in float64, over valid pixels only."""

import hashlib
import json

import numpy as np
import pytest

from sarjax.data import statistics
from sarjax.data.store import open_directory
from sarjax.errors import UserError


def test_against_numpy(ombria, whu):
    for _, dataset in (ombria, whu):
        tiles = list(dataset.split("train"))
        for m in dataset.spec.modality_names:
            pixels = np.concatenate([t[m][t[f"{m}_valid"] > 0] for t in tiles]).astype(np.float64)
            assert 0 < len(pixels) < sum(t[f"{m}_valid"].size for t in tiles)
            bands = dataset.statistics.bands[m]
            assert bands.count == len(pixels)
            np.testing.assert_allclose(bands.mean, pixels.mean(0), rtol=1e-12)
            np.testing.assert_allclose(bands.std, pixels.std(0), rtol=1e-10)
            np.testing.assert_array_equal(bands.minimum, pixels.min(0))
            np.testing.assert_array_equal(bands.maximum, pixels.max(0))
        labels = np.concatenate([t["label"].ravel() for t in tiles])
        counts = [int((labels == k).sum()) for k in range(dataset.spec.num_classes)]
        assert list(dataset.statistics.class_pixels) == counts
        assert sum(counts) < labels.size


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_moments_far_from_zero(dtype):
    rng = np.random.default_rng(0)
    centre = 200 if dtype == np.uint8 else 60_000
    pixels = (centre + rng.normal(0, 3, (5000, 2))).astype(dtype)
    moments = statistics.Moments(2)
    for part in np.array_split(pixels, [0, 1, 17, 4000]):
        moments.add(part)
    result = moments.result()
    np.testing.assert_allclose(result.mean, pixels.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(result.std, pixels.astype(np.float64).std(0), rtol=1e-9)
    assert result.count == 5000


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_nothing_and_constants(dtype):
    assert statistics.Moments(2).result().std == (0.0, 0.0)
    moments = statistics.Moments(1)
    moments.add(np.zeros((9, 1), dtype))
    assert (moments.result().mean, moments.result().std, moments.result().count) == ((0.0,), (0.0,), 9)


def test_records_are_checksummed(ombria):
    _, dataset = ombria
    assert dataset.statistics.tiles == {"train": 6, "val": 2, "test": 2}
    assert len(dataset.statistics.records) == 3
    for name, checksum in dataset.statistics.records.items():
        assert hashlib.sha256((dataset.directory / name).read_bytes()).hexdigest() == checksum


def test_they_can_be_made_again(tmp_path, ombria_source):
    from sarjax.data.build import build

    directory = build("ombria", ombria_source, tmp_path / "out")
    before = open_directory(directory)
    (directory / "stats.json").unlink()
    with pytest.raises(UserError, match=r"has no stats.json: make it with `sarjax data stats"):
        open_directory(directory)
    statistics.write(directory)
    assert open_directory(directory).fingerprint == before.fingerprint
    text = json.loads((directory / "stats.json").read_text())
    text["class_pixels"][0] += 1
    (directory / "stats.json").write_text(json.dumps(text))
    assert open_directory(directory).fingerprint != before.fingerprint
    (directory / "stats.json").write_text("{")
    with pytest.raises(UserError, match=r"stats.json is damaged"):
        open_directory(directory)
    statistics.write(directory)
    assert open_directory(directory).fingerprint == before.fingerprint
