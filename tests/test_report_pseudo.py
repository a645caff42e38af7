"""`sarjax report RUN pseudo`: counts by hand, a real run of the verb, and runs that have none."""

import json

import jax
import numpy as np
import pytest
from verbs import SHRINK, fails, run

from sarjax.data.pipeline import labelled_split
from sarjax.data.store import open_dataset
from sarjax.reports.pseudo import Tally, boundary
from sarjax.reports.training import open_training
from sarjax.spec import IGNORE_LABEL

pytestmark = pytest.mark.usefixtures("session_devices")


def plain_boundary(label, reach):
    out = np.zeros(label.shape, bool)
    for y, x in np.ndindex(label.shape):
        near = label[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        out[y, x] = label[y, x] != IGNORE_LABEL and len(set(near[near != IGNORE_LABEL].tolist())) > 1
    return out


@pytest.mark.parametrize("reach", [1, 3])
def test_boundary(reach):
    label = np.zeros((20, 17), np.uint8)
    label[5:9, 4:12] = 6
    label[0, 0] = 3
    label[12:, :8] = IGNORE_LABEL
    label[19, 16] = IGNORE_LABEL
    np.testing.assert_array_equal(boundary(label, reach), plain_boundary(label, reach))
    assert not boundary(np.full((4, 4), IGNORE_LABEL)).any()
    assert not boundary(np.full((1, 1), 2)).any()


def test_tally():
    truth = np.zeros((12, 12), np.uint8)
    truth[:, 6:] = 1
    truth[0] = IGNORE_LABEL
    argmax, label, weight = np.zeros((12, 12), int), np.ones((12, 12), int), np.zeros((12, 12))
    weight[:, 8:] = 0.3
    weight[:, 0] = 0.2
    covered = np.ones((12, 12), bool)
    covered[6:] = False
    tally = Tally(3)
    for half in (covered, ~covered):
        tally.add(truth, argmax, label, weight, half)
    found = tally.rows()
    assert found["boundary"] == {
        "pixels": 66, "argmax": 0.5, "reassigned": 0.5, "counted": 11 / 66, "counted_right": 1.0,
    }  # fmt: skip
    assert found["all"] == {
        "pixels": 132, "argmax": 0.5, "reassigned": 0.5, "counted": 55 / 132, "counted_right": 0.8,
    }  # fmt: skip
    assert tally.truth.tolist() == [66, 66, 0]
    assert Tally(2).rows()["inside"] == {
        "pixels": 0, "argmax": None, "reassigned": None, "counted": None, "counted_right": None,
    }  # fmt: skip


def test_the_verb(fake_records, tmp_path, capsys):
    few = ("--data-dir", fake_records, *SHRINK, "--data.labelled", "0.4", "--data.labelled-seed", "3")
    run("train", "dllr", "--data", "ombria", "--workdir", tmp_path / "run", *few)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    dataset = open_dataset("ombria", "", str(fake_records))
    tiles = dataset.split("train")
    drawn, free = labelled_split(len(tiles), 0.4, 3)
    assert manifest["labelled"] == drawn.tolist() != labelled_split(len(tiles), 0.4, 0)[0].tolist()
    capsys.readouterr()
    run("report", tmp_path / "run", "pseudo", "--tiles", "2", "--head", "sar")
    out, err = capsys.readouterr()
    assert "reassigned" in out
    assert "pseudo-sar.png" in err
    folder = tmp_path / "run" / "reports"
    assert (folder / "pseudo-sar.png").read_bytes().startswith(b"\x89PNG")
    run("report", tmp_path / "run", "pseudo", "--json")
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((folder / "pseudo-fused.json").read_text())
    assert content["tiles"] == [tiles.name(int(i)) for i in free]
    # Whatever the batches: all of these pixels and no others, and what inference says of them.
    training = open_training(tmp_path / "run", "best", "", lambda line: None)
    predict = jax.jit(training.method.heads["fused"].predict)
    pixels = right = 0
    for tile in (tiles[int(i)] for i in free):
        answer = predict(training.state.params, training.state.stats, {k: v[None] for k, v in tile.items()})
        there = (tile["sar_valid"] > 0).all(0) | (tile["optical_valid"] > 0).all(0)
        known = there & (tile["label"] != IGNORE_LABEL)
        pixels, right = pixels + known.sum(), right + (known & (answer[0].argmax(-1) == tile["label"])).sum()
    assert content["zones"]["all"]["pixels"] == pixels > 0
    assert abs(content["zones"]["all"]["argmax"] - right / pixels) < 1e-3
    assert 0 <= content["zones"]["all"]["reassigned"] <= 1
    assert abs(sum(c["asked"] for c in content["class_mass"].values()) - 1) < 1e-5
    assert "did you mean 'sar'" in fails(capsys, "report", tmp_path / "run", "pseudo", "--head", "sur")
    assert "--batches is 0" in fails(capsys, "report", tmp_path / "run", "pseudo", "--batches", "0")
    run("train", "dllr_supervised", "--data", "ombria", "--workdir", tmp_path / "plain", *few)
    assert "makes no pseudo-labels" in fails(capsys, "report", tmp_path / "plain", "pseudo")
