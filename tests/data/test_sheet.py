"""The sheet of a data set: drawn, in the right colours, without touching matplotlib's global state."""

import os

import numpy as np
import pytest
from PIL import Image

from sarjax.errors import UserError
from sarjax.reports import drawing, sheet


def test_it_is_drawn(ombria, whu, tmp_path):
    for _, dataset in (ombria, whu):
        path = sheet.sheet(dataset, "train", tmp_path / f"{dataset.spec.name} ü.png", 2)
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for c in (*dataset.spec.palette, drawing.NO_DATA):
            assert (pixels == c).all(-1).sum() > 50, c
    assert len(os.listdir(tmp_path)) == 2


def test_bands_and_stretch(ombria, whu):
    assert drawing.shown_bands(whu[1].spec.modality("optical")) == (2, 1, 0)
    assert drawing.shown_bands(ombria[1].spec.modality("optical")) == (0, 1, 2)
    assert drawing.shown_bands(ombria[1].spec.modality("sar")) == (0,)
    image = np.linspace(50, 60, 10_000, dtype=np.float32).reshape(100, 100, 1)
    valid = np.ones((100, 100), np.uint8)
    valid[0, 0] = 0
    shown = drawing.display(image, valid, ombria[1].spec.modality("sar"))
    assert tuple(shown[0, 0]) == drawing.NO_DATA
    assert (shown[0, 1:50] == 0).all()
    assert (shown[-1, -50:] == 255).all()
    assert abs(int(shown[50, 0, 0]) - 128) <= 1


def test_the_histogram_is_of_the_training_labels(whu):
    rows = sheet.class_histogram(whu[1])
    assert [row["class"] for row in rows] == list(whu[1].spec.class_names)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["pixels"] for row in rows] == list(whu[1].statistics.class_pixels)


def test_bad_requests(ombria, tmp_path):
    with pytest.raises(UserError, match="unknown split of ombria"):
        sheet.sheet(ombria[1], "trainn", tmp_path / "x.png", 2)
    with pytest.raises(UserError, match="at least 1"):
        sheet.sheet(ombria[1], "train", tmp_path / "x.png", 0)
    with pytest.raises(UserError, match=r"cannot write .*x.png"):
        sheet.sheet(ombria[1], "train", tmp_path / "gone" / "x.png", 1)
