"""Metrics against scikit-learn's numbers, and by what must hold for any confusion matrix."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sarjax.evaluate.confusion import confusion_matrix
from sarjax.evaluate.metrics import PER_CLASS, metrics, nan_mean, tile_mean

matrices = st.integers(1, 6).flatmap(
    lambda k: arrays(np.int64, (k, k), elements=st.sampled_from([0, 0, 1, 3, 1000, 10**12]))
)


def test_against_scikit_learn(oracle):
    arrays_, description = oracle("metrics")
    for name, case in description["cases"].items():
        cm = np.asarray(confusion_matrix(arrays_[f"{name}/pred"], arrays_[f"{name}/label"], None, case["num_classes"]))
        assert np.array_equal(cm, arrays_[f"{name}/cm"])
        some = metrics(cm, [c for c in range(case["num_classes"]) if c != case["others"]])
        every = metrics(cm)
        wanted = {scalar: arrays_[f"{name}/{scalar}"] for scalar in case["scalars"]}
        got = {"oa": some.oa, "kappa": some.kappa, "fwiou": some.fwiou}
        for metric in PER_CLASS:
            got |= {f"macro_{metric}": some.macro_zero[metric], f"macro_nan_{metric}": some.macro[metric]}
            got |= {f"all_{metric}": every.macro_zero[metric], f"all_nan_{metric}": every.macro[metric]}
            per_class = getattr(some, metric)
            np.testing.assert_allclose(per_class, arrays_[f"{name}/{metric}_nan"], atol=1e-6)
            np.testing.assert_allclose(np.nan_to_num(per_class), arrays_[f"{name}/{metric}"], atol=1e-6)
        assert set(got) == set(wanted)
        for scalar in wanted:
            np.testing.assert_allclose(got[scalar], wanted[scalar], atol=1e-6, err_msg=f"{name} {scalar}")
        assert np.array_equal(some.support, arrays_[f"{name}/support"])


def test_a_matrix_by_hand():
    # class 2 is in neither truth nor prediction; class 3 is predicted once, never true
    m = metrics(np.array([[6, 2, 0, 0], [1, 5, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]), (0, 1, 2, 3))
    assert m.oa == pytest.approx(11 / 15)
    np.testing.assert_allclose(m.iou, [6 / 9, 5 / 9, np.nan, 0])
    np.testing.assert_allclose(m.f1, [12 / 15, 10 / 14, np.nan, 0])
    np.testing.assert_allclose(m.precision, [6 / 7, 5 / 7, np.nan, 0])
    np.testing.assert_allclose(m.recall, [6 / 8, 5 / 7, np.nan, np.nan])
    assert m.macro["iou"] == pytest.approx((6 / 9 + 5 / 9) / 3)
    assert m.macro_zero["iou"] == pytest.approx((6 / 9 + 5 / 9) / 4)
    assert m.macro["recall"] == pytest.approx((6 / 8 + 5 / 7) / 2)
    chance = (8 * 7 + 7 * 7) / 225
    assert m.kappa == pytest.approx((11 / 15 - chance) / (1 - chance))
    assert m.fwiou == pytest.approx(8 / 15 * 6 / 9 + 7 / 15 * 5 / 9)


@pytest.mark.parametrize("k", [1, 3])
def test_an_empty_matrix_is_nan_without_a_warning(k):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = metrics(np.zeros((k, k), np.int64))
        nothing = tile_mean([], k)
    assert all(np.isnan(v) for v in (m.oa, m.kappa, m.fwiou, *m.macro.values(), *m.macro_zero.values()))
    assert np.isnan(m.iou).all()
    assert np.isnan(nothing.iou).all()
    assert not nothing.tiles.any()


def test_no_macro_class():
    assert np.isnan(metrics(np.eye(2, dtype=np.int64), ()).macro["iou"])


def test_it_must_be_square():
    with pytest.raises(ValueError, match="square"):
        metrics(np.zeros((2, 3), np.int64))


@settings(max_examples=60, deadline=None)
@given(matrices, st.randoms(use_true_random=False))
def test_renaming_the_classes_renames_the_metrics(c, random):
    order = list(range(len(c)))
    random.shuffle(order)
    a, b = metrics(c), metrics(c[np.ix_(order, order)])
    for name in ("oa", "kappa", "fwiou"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-12)
    for name in PER_CLASS:
        np.testing.assert_allclose(getattr(a, name)[order], getattr(b, name), rtol=1e-12)
        np.testing.assert_allclose(a.macro[name], b.macro[name], rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_bounds_and_the_tie_between_f1_and_iou(c):
    m = metrics(c)
    for name in PER_CLASS:
        x = getattr(m, name)[~np.isnan(getattr(m, name))]
        assert ((x >= 0) & (x <= 1)).all()
    np.testing.assert_allclose(m.f1, 2 * m.iou / (1 + m.iou), rtol=1e-9)
    assert np.isnan(m.kappa) or -1 - 1e-9 <= m.kappa <= 1 + 1e-9
    assert np.array_equal(np.isnan(m.iou), (c.sum(0) + c.sum(1)) == 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6))
def test_a_perfect_prediction(support):
    m = metrics(np.diag(np.asarray(support, np.int64)))
    present = np.asarray(support) > 0
    for name in PER_CLASS:
        np.testing.assert_array_equal(getattr(m, name)[present], 1)
        assert np.isnan(getattr(m, name)[~present]).all()
    if present.sum() > 1:
        assert m.oa == m.fwiou == 1
        assert m.kappa == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20))
def test_adding_matrices_is_concatenating_data(seed):
    r = np.random.default_rng(seed)
    label = r.choice([0, 1, 2, 255], (4, 6, 6)).astype(np.uint8)
    prediction = r.integers(0, 3, (4, 6, 6)).astype(np.uint8)
    parts = sum(np.asarray(confusion_matrix(prediction[i : i + 2], label[i : i + 2], None, 3)) for i in (0, 2))
    whole = np.asarray(confusion_matrix(prediction, label, None, 3))
    assert np.array_equal(parts, whole)
    assert metrics(parts).oa == metrics(whole).oa


def test_mean_over_tiles():
    tiles = [
        np.array([[8, 2], [1, 5]]),  # both classes
        np.array([[16, 0], [0, 0]]),  # no flood, none predicted: left out for flood
        np.array([[12, 4], [0, 0]]),  # no flood, some predicted: IoU 0
    ]
    m = tile_mean(tiles, 2)
    np.testing.assert_allclose(m.iou, [(8 / 11 + 1 + 12 / 16) / 3, (5 / 8 + 0) / 2])
    np.testing.assert_allclose(m.f1, [(16 / 19 + 1 + 24 / 28) / 3, (10 / 13 + 0) / 2])
    assert m.tiles.tolist() == [3, 2]


def test_nan_mean():
    assert nan_mean([1.0, np.nan, 3.0]) == 2
    assert np.isnan(nan_mean([]))
