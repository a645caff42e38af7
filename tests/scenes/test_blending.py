"""Sums over windows are those of an accumulator as large as the scene, whatever the overlap."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax.scenes.blending import Blender
from sarjax.scenes.windows import Windows, cut, shares


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(0, 3), st.integers(1, 4), st.integers(0, 9))
def test_a_blender_is_one_large_sum(size, overlap, step, seed):
    alignment = 4
    overlap *= alignment
    windows = Windows(2 * overlap + step * alignment, overlap)
    rows, columns = (cut(n, windows, alignment) for n in size)
    rng = np.random.default_rng(seed)
    whole, made = np.zeros((rows.padded, columns.padded, 2)), np.full((*size, 2), np.nan)
    row_shares, column_shares = shares(rows, overlap, 3), shares(columns, overlap, 3)
    with tempfile.TemporaryDirectory() as folder:
        blender = Blender(rows, columns, overlap, 3, 2, Path(folder))
        for i, y in enumerate(rows.origins):
            for j, x in enumerate(columns.origins):
                values = rng.random((rows.length, columns.length, 2)).astype(np.float32)
                weight = row_shares[i][:, None, None] * column_shares[j][:, None]
                whole[y : y + rows.length, x : x + columns.length] += values * weight
                (top, left, height, width), sums = blender.add(i, j, values)
                assert sums.shape == (height, width, 2)
                assert np.isnan(made[top : top + height, left : left + width]).all(), "finished twice"
                made[top : top + height, left : left + width] = sums
    np.testing.assert_allclose(made, whole[: size[0], : size[1]], atol=1e-6)


def test_a_window_of_nothing(tmp_path):
    rows, columns = cut(8, Windows(8, 0), 4), cut(12, Windows(8, 2), 4)
    blender = Blender(rows, columns, 2, None, 1, tmp_path)
    first = blender.add(0, 0, np.ones((8, 8, 1), np.float32))
    second = blender.add(0, 1, None)
    assert (first.part, second.part) == ((0, 0, 8, 4), (0, 4, 8, 8))
    np.testing.assert_array_equal(first.values, 1)
    np.testing.assert_allclose(second.values[0, :, 0], [0.875, 0.625, 0.375, 0.125, 0, 0, 0, 0])


def test_what_is_kept_does_not_grow_with_the_scene(tmp_path):
    most = []
    for width in (400, 4000):
        rows, columns = cut(200, Windows(64, 16), 4), cut(width, Windows(64, 16), 4)
        blender = Blender(rows, columns, 16, None, 3, tmp_path)
        held = 0
        for i in range(len(rows.origins)):
            for j in range(len(columns.origins)):
                blender.add(i, j, np.ones((64, 64, 3), np.float32))
                arrays = [v for v in vars(blender).values() if isinstance(v, np.ndarray) and v.ndim == 3]
                held = max(held, sum((a if a.base is None else a.base).nbytes for a in arrays))
        most.append(held)
    assert max(most) <= 64 * 64 * 3 * 4, "no more than a window"
