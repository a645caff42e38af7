"""Asymmetric masks: every cell is seen by a sensor, whole cells are hidden, and a draw depends on its row alone."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax.augment.masking import asymmetric_masks


def keys(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**30)
)
def test_every_cell_is_seen(h, w, cell, optical, sar, seed):
    optical, sar = np.float32(optical), np.float32(sar) * (1 - np.float32(optical))
    masks = asymmetric_masks(keys(2, seed), h, w, cell=cell, optical=float(optical), sar=float(sar))
    assert masks.optical.shape == masks.sar.shape == (2, h, w)
    assert (masks.optical | masks.sar).all()
    for mask in masks:
        for y in range(0, h, cell):
            for x in range(0, w, cell):
                part = np.asarray(mask)[:, y : y + cell, x : x + cell]
                assert (part == part[:, :1, :1]).all(), "a cell is hidden whole"


def test_shares_and_ends():
    masks = asymmetric_masks(keys(64), 320, 320, cell=10, optical=0.5, sar=0.25)
    np.testing.assert_allclose([m.mean() for m in masks], [0.5, 0.75], atol=0.01)
    assert not (np.asarray(masks.optical) == np.asarray(masks.sar)).all()
    all_seen = asymmetric_masks(keys(2), 32, 32, cell=8, optical=0.0, sar=0.0)
    assert all_seen.optical.all()
    assert all_seen.sar.all()
    none = asymmetric_masks(keys(2), 32, 32, cell=8, optical=1.0, sar=0.0)
    assert not none.optical.any()
    assert none.sar.all()


def test_a_row_depends_on_its_key_alone():
    many, one = (asymmetric_masks(k, 64, 64, cell=16, optical=0.5, sar=0.3) for k in (keys(5), keys(5)[3:4]))
    np.testing.assert_array_equal(many.optical[3], one.optical[0])
    assert len({m.tobytes() for m in np.asarray(many.optical)}) == 5


def test_shares_that_hide_a_cell_from_both_are_refused():
    with pytest.raises(ValueError, match="hide some cells from both"):
        asymmetric_masks(keys(1), 8, 8, cell=4, optical=0.6, sar=0.5)
