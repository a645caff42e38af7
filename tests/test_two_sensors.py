"""A user's own pairs, most of them unlabelled: DLLR with every switch, from files to maps of one sensor and of both."""

import json

import fake_data
import numpy as np
import pytest
import rasterio
from fake_folder import CLASSES, image, write
from verbs import SHRINK, fails, run

pytestmark = pytest.mark.usefixtures("session_devices")

TOML = f"""
name = "pairs"
tile = 64
ignore = [-1]
[sar]
bands = ["VV", "VH"]
radiometry = "intensity"
[optical]
suffix = "_rgb"
{CLASSES}
"""
EVERYTHING = [
    *("--method.region", "--method.dice", "1", "--method.mass", "hard", "--method.cost", "linear"),
    *("--method.epsilon", "0.05", "--method.unlabelled", "2", "--method.threshold", "0.5"),
    *("--augment.speckle", "4", "--data.labelled", "0.3"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ten pairs; a scene's optical image is half empty, a label all ignored."""
    root = tmp_path_factory.mktemp("pairs")
    r = np.random.default_rng(0)
    for i in range(10):
        optical = image(3)
        optical[:, : 32 * (i == 4)] = 0
        label = r.choice([0, 1, 7], (64, 64)).astype(np.int16) if i != 5 else np.full((64, 64), -1, np.int16)
        write(root / f"sar/{i}.tif", image(2, "float32"))
        write(root / f"optical/{i}_rgb.png", optical)
        fake_data.write_tiff(root / f"label/{i}.tif", label)
    (root / "dataset.toml").write_text(TOML)
    run("data", "build", "paired_folder", "--source", root, "--out", root / "records")
    return root


def test_from_pairs_to_maps(records, tmp_path, capsys):
    own = ("--data-dir", records / "records", "--data.name", "paired_folder", "--data.config", "pairs")
    run("train", "dllr", "--workdir", tmp_path / "run", *own, *SHRINK, *EVERYTHING)
    values = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = {name for line in values for name in line if name.startswith(("cross_s", "cons", "comp", "dice", "pseudo"))}
    assert len(terms) >= 10, terms
    capsys.readouterr()
    run("report", tmp_path / "run", "pseudo", "--json")
    assert json.loads(capsys.readouterr().out)["zones"]["all"]["pixels"] > 0

    sar, optical = records / "sar/0.tif", records / "optical/0_rgb.png"
    places = {
        "sar": [sar, "--head", "sar"],
        "optical": [optical, "--head", "optical"],
        "fused": [f"sar={sar},optical={optical}"],
    }
    maps = {}
    for head, what in places.items():
        run("predict", tmp_path / "run", *what, "--out", tmp_path / head, "--probabilities")
        (path,) = (tmp_path / head).glob("*_probabilities.tif")
        with rasterio.open(path) as f:
            maps[head] = f.read()
            assert f.shape == (64, 64)
        np.testing.assert_allclose(maps[head].sum(0), 1, atol=1e-5)
    assert not np.array_equal(maps["sar"], maps["fused"])
    assert not np.array_equal(maps["sar"], maps["optical"])
    assert "sar=" in fails(capsys, "predict", tmp_path / "run", sar, "--out", tmp_path / "none")
    capsys.readouterr()
    run("eval", tmp_path / "run", "--head", "sar", "--json")
    assert json.loads(capsys.readouterr().out)["pooled"]["pixel_accuracy"] > 0


def test_all_labelled_is_one_sentence(records, tmp_path, capsys):
    own = ("--data-dir", records / "records", "--data.name", "paired_folder", "--data.config", "pairs")
    message = fails(capsys, "train", "dllr", "--workdir", tmp_path / "all", *own, *SHRINK, "--data.labelled", "1")
    assert "labelled" in message
    assert not (tmp_path / "all").exists()
