"""Products of matrices are the convolution, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from sarjax.models.convolution import LAYOUT, as_elsewhere, convolve, kernel_gradient


def case(seed, batch, size, channels, kernel, stride, dilation, pads):
    """(image, kernel, gradient of the output, how) in float64; None where the output would be empty."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((batch, *size, channels[0])), rng.standard_normal((*kernel, *channels))
    how = {"strides": stride, "padding": pads, "rhs_dilation": dilation}
    shape = jax.eval_shape(lambda x, w: plain(x, w, **how), x, w).shape
    return None if 0 in shape else (x, w, rng.standard_normal(shape), how)


def plain(x, w, *, strides, padding, rhs_dilation):
    return lax.conv_general_dilated(x, w, strides, padding, rhs_dilation=rhs_dilation, dimension_numbers=LAYOUT)


def ours(x, w, *, strides, padding, rhs_dilation):
    return convolve(x, w, strides, padding, rhs_dilation=rhs_dilation, dimension_numbers=LAYOUT)


pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 3),
    pair(1, 9),
    pair(1, 4),
    pair(1, 7),
    pair(1, 3),
    st.one_of(st.just((1, 1)), pair(1, 9)),
    st.tuples(pair(0, 4), pair(0, 4)),
    st.booleans(),
)
def test_equals_the_convolution(seed, batch, size, channels, kernel, stride, dilation, pads, same):
    if same:  # the size stays, as nearly everywhere in the networks; an even kernel is padded unevenly
        stride = (1, 1)
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pads = tuple((n // 2, n - n // 2) for n in reach)
    with jax.enable_x64(True):
        made = case(seed, batch, size, channels, kernel, stride, dilation, pads)
        if made is None:
            return
        x, w, g, how = made
        found = kernel_gradient(x, g, kernel, stride, pads, dilation)
        assert found.dtype == jnp.float64
        y, gradients = jax.vjp(lambda x, w: plain(x, w, **how), x, w)
        np.testing.assert_allclose(found, gradients(g)[1], rtol=1e-10, atol=1e-10)
        for one, other in zip(
            (lambda y, f: (y, *f(g)))(*jax.vjp(lambda x, w: ours(x, w, **how), x, w)), (y, *gradients(g)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 1, 6), (3, 1, 12), (7, 2, 1)],
)
def test_both_gradients_of_what_networks_call(kernel, stride, dilation, dtype):
    pad = dilation * (kernel - 1) // 2
    how = {"strides": (stride,) * 2, "padding": ((pad, pad),) * 2, "rhs_dilation": (dilation,) * 2}
    x, w, _, _ = case(
        0,
        2,
        (11, 8),
        (5, 6),
        (kernel,) * 2,
        **{"stride": (stride,) * 2, "dilation": (dilation,) * 2, "pads": ((pad, pad),) * 2},
    )
    x, w = (jnp.asarray(a, dtype) for a in (x, w))
    y = plain(x, w, **how)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype)
    (found, pulled), (wanted, pull) = (jax.vjp(lambda x, w, f=f: f(x, w, **how), x, w) for f in (ours, plain))
    if dilation == 1:
        np.testing.assert_array_equal(found, wanted)
    for one, other in zip((found, *pulled(g)), (wanted, *pull(g)), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype == jnp.dtype(dtype)
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(
            one.astype(jnp.float32),
            other.astype(jnp.float32),
            rtol=0,
            atol=scale * (1e-6 if dtype == "float32" else 2e-2),
        )


@pytest.mark.parametrize(
    "wrong", [{"feature_group_count": 2}, {"lhs_dilation": (2, 2)}, {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}]
)
def test_other_convolutions_are_refused(wrong):
    with pytest.raises(ValueError, match="without groups"):
        convolve(
            jnp.ones((1, 4, 4, 4)),
            jnp.ones((3, 3, 4, 4)),
            (1, 1),
            ((1, 1), (1, 1)),
            **{"dimension_numbers": LAYOUT} | wrong,
        )


def test_programs_that_stand_for_other_devices_have_their_gradient():
    x, w = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    how = {"strides": (1, 1), "padding": ((1, 1), (1, 1))}

    def products():
        loss = lambda w: convolve(x, w, *how.values(), dimension_numbers=LAYOUT).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(w).as_text().count("dot_general")

    with as_elsewhere():
        assert products() == 0
    assert products() == 1


def products_of(size, dilation):
    """How many products and convolutions a 3 x 3 kernel's value is made of on a CPU."""
    how = {"strides": (1, 1), "padding": ((dilation,) * 2,) * 2, "rhs_dilation": (dilation,) * 2}
    text = jax.jit(lambda x, w: ours(x, w, **how)).lower(jnp.ones((1, size, size, 4)), jnp.ones((3, 3, 4, 4))).as_text()
    return text.count("dot_general"), text.count("stablehlo.convolution")


def test_padding_is_left_out():
    assert products_of(16, 6) == (9, 0)
    assert products_of(16, 15) == (9, 0)
    assert products_of(16, 16) == (0, 1), "the middle alone sees the image, everywhere"
    assert products_of(64, 6) == (0, 1), "little of it is padding"
    assert products_of(1, 1) == (0, 1)
