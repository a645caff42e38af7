"""Tables and pictures hold what the confusion matrix says, and are written whole or not at all."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from sarjax.evaluate.evaluator import Evaluation
from sarjax.reports import drawing
from sarjax.reports import evaluation as reports
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

PIL = pytest.importorskip("PIL.Image")
SPEC = DatasetSpec(
    "toy",
    (
        ModalitySpec("sar", (BandSpec("VV", "intensity"), BandSpec("VH", "intensity")), "float32"),
        ModalitySpec("optical", tuple(BandSpec(n, "reflectance") for n in "rgbn")),
    ),
    tuple(ClassSpec(n, c) for n, c in (("dry", (200, 180, 90)), ("flood", (0, 0, 255)), ("other", (9, 9, 9)))),
    dates=2,
    excluded=("other",),
)
AP_DRY = (80 + 5 * 85 / 109) / 85


@pytest.fixture
def evaluation():
    per_tile = {3: np.array([[50, 5, 0], [4, 20, 0], [0, 0, 0]]), 12: np.array([[30, 0, 0], [0, 0, 0], [0, 0, 0]])}
    scores = np.zeros((3, 2, 5), np.int64)
    scores[0] = [[0, 24, 0, 0, 0], [0, 5, 0, 0, 80]]
    scores[1] = [[80, 0, 0, 0, 5], [0, 0, 0, 24, 0]]
    scores[2, 0] = [109, 0, 0, 0, 0]
    return Evaluation(sum(per_tile.values()), per_tile, scores)


def test_json_round_trip(evaluation, tmp_path):
    path = tmp_path / "e.json"
    reports.write_json(path, evaluation, SPEC)
    d = json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert d["classes"]["other"]["iou"] is None
    assert d["classes"]["flood"]["iou"] == pytest.approx(20 / 29)
    assert d["classes"]["flood"]["tiles"] == 1
    assert d["macro_classes"] == ["dry", "flood"]
    assert d["classes"]["flood"]["ap"] == pytest.approx(24 / 29)
    assert d["classes"]["other"]["ap"] is None
    assert d["pooled"]["map"] == pytest.approx((AP_DRY + 24 / 29) / 2)
    back = reports.read_json(path)
    assert back.scores.dtype == np.int64
    assert np.array_equal(back.scores, evaluation.scores)
    assert np.array_equal(back.confusion, evaluation.confusion)
    assert list(back.per_tile) == [3, 12]
    assert np.array_equal(back.per_tile[3], evaluation.per_tile[3])
    assert [p.name for p in tmp_path.iterdir()] == ["e.json"]


def test_what_was_written_before_there_were_scores(evaluation, tmp_path):
    d = reports.to_dict(evaluation, SPEC)
    del d["scores"]
    old = reports.from_dict(d)
    assert old.scores is None
    assert reports.from_dict(reports.to_dict(old, SPEC)).scores is None
    found = reports.to_dict(old, SPEC)
    assert found["classes"]["flood"]["ap"] is found["pooled"]["map"] is None
    assert found["classes"]["flood"]["iou"] == d["classes"]["flood"]["iou"]
    reports.write_csv(tmp_path / "e.csv", old, SPEC)
    assert [r["ap"] for r in csv.DictReader((tmp_path / "e.csv").open())] == [""] * 4
    reports.table(old, SPEC)


def test_csv(evaluation, tmp_path):
    reports.write_csv(tmp_path / "e.csv", evaluation, SPEC)
    rows = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert [r["class"] for r in rows] == ["dry", "flood", "other", "macro"]
    assert float(rows[1]["iou"]) == pytest.approx(20 / 29, abs=1e-6)
    assert rows[2]["iou"] == ""
    assert float(rows[0]["ap"]) == pytest.approx(AP_DRY, abs=1e-6)
    assert rows[2]["ap"] == ""
    assert float(rows[3]["ap"]) == pytest.approx((AP_DRY + 24 / 29) / 2, abs=1e-6)
    assert float(rows[3]["iou"]) == pytest.approx((80 / 89 + 20 / 29) / 2, abs=1e-6)
    assert float(rows[0]["tile_mean_iou"]) == pytest.approx((50 / 59 + 1) / 2, abs=1e-6)


def test_table_fits_a_terminal(evaluation):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(reports.table(evaluation, SPEC))
    text = console.export_text()
    for shown in ("flood", "0.6897", "0.8276", "kappa", "without other", "2 tiles"):
        assert shown in text
    assert "…" not in text


def test_pictures(evaluation, tmp_path):
    r = np.random.default_rng(0)
    tile = {
        "sar": r.exponential(1, (2, 20, 30, 2)).astype(np.float32),
        "optical": r.integers(0, 255, (2, 20, 30, 4), dtype=np.uint8),
        "sar_valid": np.zeros((2, 20, 30), np.uint8),
        "optical_valid": np.ones((2, 20, 30), np.uint8),
        "label": r.choice([0, 1, 255], (20, 30)).astype(np.uint8),
    }
    reports.panels(tmp_path / "panels.png", [tile, tile], {"ours": [tile["label"] % 3] * 2}, SPEC, ["a", "b"])
    reports.confusion_png(tmp_path / "confusion.png", evaluation.confusion, SPEC.class_names)
    rows = [{"step": s, "loss": None if s == 3 else 1 / s} for s in range(1, 30)]
    reports.curves(tmp_path / "young.png", rows[:2])
    reports.curves(tmp_path / "curves.png", [*rows, {"step": 30, "val/miou": 0.5, "val/iou/flood": None}], "toy")
    reports.curves(tmp_path / "empty.png", [])
    for name in ("panels", "confusion", "young", "curves", "empty"):
        picture = np.asarray(PIL.open(tmp_path / f"{name}.png").convert("RGB"))
        assert picture.std() > 5, name
    assert len(list(tmp_path.iterdir())) == 5


def test_colours_of_labels_and_of_no_data():
    painted = drawing.paint(np.array([[0, 1, 255]]), SPEC)
    assert painted.tolist() == [[[200, 180, 90], [0, 0, 255], [255, 255, 255]]]
    image = np.array([[[1.0, 1], [100, 1], [1e9, 1]]])
    shown = drawing.display(image, np.array([[1, 1, 0]]), SPEC.modality("sar"))
    assert shown[0, 2].tolist() == list(drawing.NO_DATA)
    assert shown[0, 0, 0] < 10 < 240 < shown[0, 1, 0]


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, sarjax.reports.evaluation; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
