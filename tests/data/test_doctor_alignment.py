"""The doctor and labels in the wrong place: what the water of the optical image says of them."""

import dataclasses

import fake_data
import numpy as np
import pytest
from toy_scenes import SPEC, Toy, found, only

from sarjax.data import doctor
from sarjax.data.doctor import check


@pytest.fixture
def lakes(tmp_path):
    return Toy(tmp_path, names=("a", "b", "c"), size=(200, 200))


def test_the_difference_is_exact(lakes):
    optical, label = (lakes.arrays["a"][k] for k in ("optical", "label"))
    optical[150:, 150:] = 0  # no-data say nothing of water
    lakes.write("optical", "a")
    green, nir = optical[..., 0].astype(float), optical[..., 1].astype(float)
    index = (green - nir) / np.where(green + nir > 0, green + nir, 1)
    seen = optical.any(-1)
    wet, dry = seen & (label == 30), seen & (label != 30) & (label != 0)
    (measured,) = check(lakes.layout()).ndwi["a"]
    assert measured == pytest.approx(index[wet].mean() - index[dry].mean(), abs=1e-6)
    assert measured > 0.2


def test_shifted_labels_are_flagged(lakes):
    lakes.write("label", "b", np.roll(lakes.arrays["b"]["label"], (37, 53), (0, 1)))
    report = check(lakes.layout())
    problem = only(report)
    assert (problem.severity, problem.kind, problem.where) == ("warning", "alignment", "b")
    assert report.ndwi["b"][0] < 0.09 < report.ndwi["a"][0]
    assert f"{report.ndwi['b'][0]:+.3f}" in problem.text


def test_labels_of_another_scene_are_flagged(lakes):
    lakes.write("label", "c", lakes.arrays["a"]["label"])
    assert found(check(lakes.layout())) == [("alignment", "c")]


def test_not_asked_for(lakes):
    lakes.write("label", "b", np.roll(lakes.arrays["b"]["label"], (37, 53), (0, 1)))
    report = check(lakes.layout(water=None))
    assert not report.problems
    assert not report.ndwi


@pytest.mark.parametrize(("wet", "dry"), [(999, None), (None, 999), (0, None), (None, 0)])
def test_too_few_pixels_are_not_judged(lakes, wet, dry):
    """`wet` pixels of water, or `dry` of anything else, all in the wrong place."""
    label = np.full(200 * 200, 10 if dry is None else 30, np.uint8)
    label[: wet or dry or 0] = 30 if dry is None else 10
    lakes.arrays["a"]["optical"][:] = (60, 90) if dry is None else (90, 60)
    lakes.write("optical", "a")
    lakes.write("label", "a", label.reshape(200, 200))
    report = check(lakes.layout())
    assert report.ndwi["a"] == (None,)
    assert not found(report, "alignment")
    label[:1000] = 30 if dry is None else 10
    lakes.write("label", "a", label.reshape(200, 200))
    report = check(lakes.layout())
    assert report.ndwi["a"] == (0,)
    assert found(report, "alignment") == [("alignment", "a")]


@pytest.mark.parametrize("wet", [39, 40])
def test_too_small_a_share_is_not_judged(lakes, monkeypatch, wet):
    monkeypatch.setattr(doctor, "JUDGED_PIXELS", 1)
    label = np.full(200 * 200, 10, np.uint8)
    label[:wet] = 30
    lakes.write("label", "a", label.reshape(200, 200))
    assert (check(lakes.layout()).ndwi["a"] == (None,)) == (wet == 39)


def test_each_date_is_judged(lakes, tmp_path):
    moved = np.roll(lakes.arrays["b"]["optical"], (37, 53), (0, 1))
    fake_data.write_tiff(tmp_path / "later.tif", moved)
    layout = lakes.layout()
    scenes = tuple(
        s._replace(images={m: (*p, tmp_path / "later.tif" if m == "optical" else p[0]) for m, p in s.images.items()})
        for s in layout.scenes
        if s.name == "b"
    )
    spec = dataclasses.replace(SPEC, dates=2)
    report = check(dataclasses.replace(layout, spec=spec, scenes=scenes, splits={"b": "train"}))
    assert only(report).kind == "alignment"
    assert report.ndwi["b"][0] > 0.2
    assert report.ndwi["b"][1] < 0.09
