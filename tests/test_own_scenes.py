"""A user arrives with files and leaves with a map: check, build, train and predict one real georeferenced chip."""

import json

import numpy as np
import pytest
import rasterio
from fake_folder import SEN1FLOODS11

from sarjax import cli
from sarjax.cli import common


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(common, "devices", lambda host_devices=0: None)


def run(*args):
    cli.main([str(a) for a in args])


@pytest.mark.slow
def test_from_files_to_a_map(shared_data, tmp_path, capsys):
    source = shared_data / "sen1floods11"
    (tmp_path / "chip.toml").write_text(SEN1FLOODS11)
    about = ("paired_folder", "--source", source, "--description", tmp_path / "chip.toml")
    run("data", "check", *about, "--json")
    report = json.loads(capsys.readouterr().out)
    assert not report["fatal"]
    assert report["classes"]["train"] == {"dry": 192_010, "water": 70_035, "ignored": 99}

    run("data", "build", *about, "--out", tmp_path / "records")
    run(
        *("train", "synthetic_sar", "--workdir", tmp_path / "run", "--data-dir", tmp_path / "records"),
        *("--data.name", "paired_folder", "--data.config", "sen1floods11", "--steps", 50, "--network.width", 0.125),
        *("--mesh.data", 1, "--batch-size", 4, "--no-tensorboard"),
    )

    # The chip as it is, and with a hole such as a swath's edge makes it.
    (path,) = (source / "S1").glob("*.tif")
    holed = tmp_path / "holed.tif"
    with rasterio.open(path) as f:
        profile, place, image = f.profile, (f.crs, f.transform), f.read()
    hole = np.add.outer(np.arange(512), np.arange(512)) < 300
    with rasterio.open(holed, "w", **profile) as f:
        f.write(np.where(hole, np.nan, image))
    capsys.readouterr()
    run("predict", tmp_path / "run", path, holed, "--out", tmp_path / "maps", "--probabilities", "--json")
    whole, with_hole = json.loads(capsys.readouterr().out)
    assert whole["no_data_pixels"] == 0
    assert with_hole["no_data_pixels"] == hole.sum()

    maps = {}
    for name in (path.stem, "holed"):
        with rasterio.open(tmp_path / "maps" / f"{name}.tif") as f:
            assert (f.crs, f.transform) == place
            assert (f.nodata, f.dtypes, f.shape) == (255, ("uint8",), (512, 512))
            assert f.colormap(1)[1] == (0, 0, 255, 255)
            maps[name] = f.read(1)
        with rasterio.open(tmp_path / "maps" / f"{name}_probabilities.tif") as f:
            assert (f.crs, f.transform, f.descriptions) == (*place, ("dry", "water"))
            assert np.isnan(f.nodata)
            probabilities = f.read()
        seen = maps[name] != 255
        np.testing.assert_array_equal(seen, ~np.isnan(probabilities[0]))
        np.testing.assert_allclose(probabilities.sum(0)[seen], 1, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(maps[name][seen], probabilities.argmax(0)[seen])
    np.testing.assert_array_equal(maps["holed"] == 255, hole)
    assert (maps[path.stem] != 255).all()

    (label_path,) = (source / "Labels").glob("*.tif")
    with rasterio.open(label_path) as f:
        label = f.read(1)
    accuracy = (maps[path.stem] == label)[label >= 0].mean()
    assert accuracy > 0.8, "50 steps on the chip itself: dry alone would be .733"
