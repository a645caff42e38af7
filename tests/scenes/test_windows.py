"""Windows cover every pixel, their shares add up to 1, and nothing counts that depends on what a window cannot see."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.scenes.windows import BLOCK, Axis, Windows, choose, cut, grid, shares


@st.composite
def cuts(draw):
    """(axis, overlap, radius, alignment) of random sizes, also smaller than a window and not aligned."""
    alignment = draw(st.sampled_from([1, 2, 3, 8, 32]))
    overlap = draw(st.integers(0, 4)) * alignment
    side = 2 * overlap + draw(st.integers(1, 6)) * alignment
    size = draw(st.integers(1, 12 * side))
    radius = draw(st.one_of(st.none(), st.integers(0, 2 * overlap + 1)))
    return cut(size, Windows(side, overlap), alignment), overlap, radius, alignment


@given(cuts())
def test_invariants(case):
    axis, overlap, radius, alignment = case
    assert axis.padded - alignment < axis.size <= axis.padded
    assert all(a % alignment == 0 for a in (axis.padded, axis.length, *axis.origins))
    assert axis.origins[0] == 0
    assert axis.origins[-1] + axis.length == axis.padded
    assert all(a < b for a, b in pairwise(axis.origins))
    weight, total = shares(axis, overlap, radius), np.zeros(axis.padded)
    assert (weight >= 0).all()
    for origin, row in zip(axis.origins, weight, strict=True):
        total[origin : origin + axis.length] += row
    np.testing.assert_allclose(total, 1, atol=1e-12)
    if radius is not None and radius <= overlap:
        for origin, row in zip(axis.origins, weight, strict=True):
            if origin:
                assert (row[:radius] == 0).all()
            if origin + axis.length < axis.padded:
                assert (row[axis.length - radius :] == 0).all()
    owned = [axis.own(i) for i in range(len(axis.origins))]
    inside = [(a, b) for a, b in owned if a < b]
    assert inside[0][0] == 0
    assert inside[-1][1] == axis.size
    assert all(a[1] == b[0] for a, b in pairwise(inside))
    assert all(b <= o + axis.length for (_, b), o in zip(owned, axis.origins, strict=True))


def test_shares_by_hand():
    axis = cut(14, Windows(8, 1), 2)
    assert axis == Axis(14, 14, 8, (0, 6))
    np.testing.assert_allclose(shares(axis, 1, None)[0], [1, 1, 1, 1, 1, 1, 0.75, 0.25])
    np.testing.assert_allclose(shares(axis, 1, 1)[0], [1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(shares(axis, 1, 1)[1], [0, 1, 1, 1, 1, 1, 1, 1])
    wide = shares(cut(16, Windows(12, 4), 4), 4, 5)  # origins 0 and 4: pixels 4 to 11 are shared
    np.testing.assert_allclose(wide[0, 4:], (np.arange(8) + 0.5)[::-1] / 8)
    np.testing.assert_allclose(wide[1], [*1 - wide[0, 4:], 1, 1, 1, 1])
    parted = shares(cut(16, Windows(12, 4), 4), 4, 4)
    np.testing.assert_array_equal(parted, [[1] * 8 + [0] * 4, [0] * 4 + [1] * 8])
    np.testing.assert_allclose(shares(cut(30, Windows(10, 0), 5), 0, None), 1)


def test_defaults():
    assert choose(FieldOfView(32, 210), 256) == (2240, 224)
    assert choose(FieldOfView(32, 0), 256) == (1024, 0)
    assert choose(FieldOfView(4, 30), 256) == (1088, 32)
    assert choose(FieldOfView(32, 528), 256) == (1088 + 1280, 544), "half of a window is its own"
    assert choose(FieldOfView(32, None), 256) == (256, 64)
    assert choose(FieldOfView(32, None), 100) == (96, 32)
    assert choose(FieldOfView(32, None), 20) == (32, 0)
    assert choose(FieldOfView(32, 210), 256, side=896) == (896, 224)
    assert choose(FieldOfView(32, 210), 256, side=864) == (864, 208), "half of it stays its own"
    assert choose(FieldOfView(32, 210), 256, side=480) == (480, 112)
    assert choose(FieldOfView(32, 210), 256, side=32) == (32, 0)
    assert choose(FieldOfView(32, 210), 256, side=256) == (256, 64), "too small for the radius"
    assert choose(FieldOfView(32, 210), 256, overlap=16) == (1056, 16)
    assert choose(FieldOfView(32, None), 256, side=128, overlap=0) == (128, 0)


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.sampled_from([(1216, 224), (2240, 224), (704, 96), (96, 32), (672, 0)]),
    st.integers(1, 8),
)
def test_a_grid_computes_no_more_than_equal_windows(size, windows, together):
    windows, context = Windows(*windows), FieldOfView(32, windows[1])

    def work(axes):
        (count, area) = (math.prod(f(axis) for axis in axes) for f in (lambda a: len(a.origins), lambda a: a.length))
        return -(-count // together) * together * area

    axes = grid(*size, windows, context, together)
    equal = tuple(cut(n, windows, 32) for n in size)
    assert work(axes) <= work(equal)
    for axis, plain in zip(axes, equal, strict=True):
        step = axis.length - 2 * windows.overlap
        assert (axis.size, axis.padded) == (plain.size, plain.padded)
        assert axis.length <= plain.length
        assert axis == plain or windows.side % BLOCK != 2 * windows.overlap % BLOCK or step % BLOCK == 0
        assert len(axis.origins) == 1 or cut(axis.size, Windows(axis.length, windows.overlap), 32) == axis
    # A global network sees windows of the side that it was trained on, and what overlaps too little is not as exact.
    assert grid(*size, windows, FieldOfView(32, None), together) == equal
    assert grid(*size, windows, FieldOfView(32, windows.overlap + 1), together) == equal


def test_a_large_scene():
    """WHU-OPT-SAR's: two rows of three windows instead of five of seven, and 1.46 times its pixels instead of 2.5."""
    context = FieldOfView(32, 210)
    rows, columns = grid(3704, 5556, choose(context, 256), context, 2)
    assert (rows.length, rows.origins) == (2240, (0, 1472))
    assert (columns.length, columns.origins) == (2240, (0, 1792, 3328))
    rows, columns = grid(2048, 2048, choose(context, 256), context, 2)
    assert (rows.length, columns.length) == (2048, 1472), "one for each device, not one that both compute"


@pytest.mark.parametrize(
    ("side", "overlap", "message"),
    [
        (100, None, r"--window is 100, but this network needs a multiple of 32, such as 96"),
        (-32, None, r"--window is -32"),
        (0, 20, r"--overlap is 20, but twice it must be a multiple of 32 for this network: 32 is"),
        (0, -16, r"--overlap is -16"),
        (128, 64, r"--overlap is 64 in windows of 128 pixels, which leaves nothing between; below 64"),
    ],
)
def test_what_does_not_fit_is_refused(side, overlap, message):
    with pytest.raises(UserError, match=message):
        choose(FieldOfView(32, 210), 256, side, overlap)
