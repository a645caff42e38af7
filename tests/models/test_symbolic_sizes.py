"""Resizing and pools whose sizes are known only when the program runs: against those of known sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export

from sarjax.models import resampling
from sarjax.models.resampling import LARGEST_SIDE, adaptive_avg_pool, avg_pool, max_pool, resize_bilinear

ULP = {"rtol": 0, "atol": 1.2e-7}  # of a weight up to 1
sizes = st.integers(1, 300)


@settings(deadline=None, max_examples=6)
@given(sizes, sizes)
@example(1, 1)
@example(7, 1)
@example(1, 7)
@example(LARGEST_SIDE, 17)
@example(LARGEST_SIDE - 1, 17)
@example(17, LARGEST_SIDE - 1)
@example(17, LARGEST_SIDE)
def test_weights_are_those_of_known_sizes(n, out):
    ours = jax.jit(
        lambda: (
            resampling._bilinear_weights(n, out, False),
            resampling._bilinear_weights(n, out, True),
            resampling._bin_weights(n, out),
        )
    )()
    matrices = (
        resampling._bilinear_matrix(n, out, False),
        resampling._bilinear_matrix(n, out, True),
        resampling._bin_matrix(n, out),
    )
    for weights, matrix in zip(ours, matrices, strict=True):
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(weights, matrix, **ULP)


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_largest_sides_do_not_overflow(align_corners):
    n = LARGEST_SIDE
    for weights in (resampling._bilinear_weights, lambda n, out, _: resampling._bin_weights(n, out)):
        last = np.asarray(jax.jit(lambda weights=weights: weights(n, n, align_corners)[-1])())
        assert np.flatnonzero(last).tolist() == [n - 1]
        assert last[-1] == 1


FUNCTIONS = {
    "finer": lambda x: resize_bilinear(x, (4 * x.shape[1], 3 * x.shape[2])),
    "coarser": lambda x: resize_bilinear(x, (max(x.shape[1] // 2, 1), max(x.shape[2] // 3, 1))),
    "one axis": lambda x: resize_bilinear(x, (5, x.shape[2])),
    "corners": lambda x: resize_bilinear(x, (2 * x.shape[1], 7), align_corners=True),
    "equal bins": lambda x: adaptive_avg_pool(x, (x.shape[1] // 2, x.shape[2] // 3)),
    "ragged bins": lambda x: adaptive_avg_pool(x, (5, max(x.shape[2] // 4, 1))),
    "pools": lambda x: avg_pool(max_pool(x, 3, 2, 1), 7, 1, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_program_for_all_sizes(name):
    function = FUNCTIONS[name]
    b, h, w = export.symbolic_shape("b, 2*h, 12*w")
    program = export.export(jax.jit(function))(jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32))
    for shape in ((1, 2, 12, 3), (2, 14, 36, 3), (1, 22, 24, 3)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(program.call(x), function(x), rtol=0, atol=2e-6)


def test_weights_of_known_sizes_stay_constants():
    """A run's bits do not depend on whether it is ever exported."""
    x = jnp.ones((1, 6, 9, 2))
    for function in (lambda x: resize_bilinear(x, (12, 9)), lambda x: adaptive_avg_pool(x, (4, 9))):
        assert "iota" not in str(jax.make_jaxpr(function)(x))
