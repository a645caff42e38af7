"""Resampling, pools and batch-norm: against PyTorch's numbers, float64 loops, and invariants."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax.models import layers, resampling
from sarjax.models.resampling import adaptive_avg_pool, avg_pool, grid_sample, max_pool, resize_bilinear

EXACT = {"atol": 1e-5, "rtol": 1e-5}
sizes = st.integers(1, 13)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cases_of(arrays, kind):
    return sorted({key.split("/")[0] for key in arrays if key.startswith(kind)})


def gradient_of(function, x, probe):
    return jax.jit(jax.grad(lambda x: (function(x) * probe).sum()))(x)


# --- PyTorch's numbers


@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_equals_torch(oracle, align_corners):
    arrays, description = oracle("resampling")
    kind, checked = f"ac{int(align_corners)}", 0
    for case in cases_of(arrays, "interp"):
        size = tuple(description["cases"][case]["size"])

        def resize(x, size=size):
            return resize_bilinear(x, size, align_corners=align_corners)

        x = nhwc(arrays[f"{case}/x"])
        np.testing.assert_allclose(resize(x), nhwc(arrays[f"{case}/{kind}"]), **EXACT, err_msg=case)
        if f"{case}/{kind}_probe" in arrays:
            gradient = gradient_of(resize, x, nhwc(arrays[f"{case}/{kind}_probe"]))
            np.testing.assert_allclose(gradient, nhwc(arrays[f"{case}/{kind}_grad_x"]), **EXACT, err_msg=case)
            checked += 1
    assert checked


@pytest.mark.parametrize(
    ("size", "target"), [((5, 7), (20, 28)), ((3, 8), (48, 8)), ((1, 1), (4, 2)), ((6, 4), (9, 8))]
)
def test_large_targets_are_sums_of_neighbours(monkeypatch, size, target):
    """Where the matrices are mostly zeros: the same values, the same gradient, and no product."""
    x, probe = random(2, *size, 3), random(2, *target, 3, seed=1)

    def both():
        jax.clear_caches()
        resize = jax.jit(lambda x: resize_bilinear(x, target))
        products = resize.lower(x).as_text().count("dot_general")
        return products, resize(x), gradient_of(resize, x, probe), resize(x.astype(jnp.bfloat16)).dtype

    by_products = both()
    monkeypatch.setattr(resampling, "LONG", 0)
    by_sums = both()
    whole = all(out % n == 0 for n, out in zip(size, target, strict=True))
    assert (by_products[0], by_sums[0]) == (2, 0 if whole else 2)
    np.testing.assert_allclose(by_sums[1], by_products[1], **EXACT)
    np.testing.assert_allclose(by_sums[2], by_products[2], **EXACT)
    assert by_sums[3] == by_products[3] == jnp.bfloat16


def test_pools_equal_torch(oracle):
    arrays, description = oracle("resampling")
    for case in cases_of(arrays, "aap"):
        y = adaptive_avg_pool(nhwc(arrays[f"{case}/x"]), tuple(description["cases"][case]["size"]))
        np.testing.assert_allclose(y, nhwc(arrays[f"{case}/y"]), **EXACT, err_msg=case)
    for case in cases_of(arrays, "avg"):
        y = avg_pool(nhwc(arrays[f"{case}/x"]), 7, 1, 3)
        np.testing.assert_allclose(y, nhwc(arrays[f"{case}/y"]), **EXACT, err_msg=case)
    for case in cases_of(arrays, "max"):
        y = max_pool(nhwc(arrays[f"{case}/x"]), 3, 2, 1)
        np.testing.assert_array_equal(y, nhwc(arrays[f"{case}/y"]), err_msg=case)


@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_sample_equals_torch(oracle, align_corners):
    arrays, _ = oracle("resampling")
    kind = f"ac{int(align_corners)}"
    for case in cases_of(arrays, "gs"):
        x, grid = nhwc(arrays[f"{case}/x"]), arrays[f"{case}/grid"]

        @jax.jit
        @partial(jax.grad, argnums=(0, 1), has_aux=True)
        def gradients(x, grid, probe):
            y = grid_sample(x, grid, align_corners=align_corners)
            return (y * probe).sum(), y

        (by_x, by_grid), y = gradients(x, grid, nhwc(arrays[f"{case}/{kind}_probe"]))
        np.testing.assert_allclose(y, nhwc(arrays[f"{case}/{kind}"]), **EXACT, err_msg=case)
        np.testing.assert_allclose(by_x, nhwc(arrays[f"{case}/{kind}_grad_x"]), **EXACT, err_msg=case)
        # At four hand-set points the gradient by the grid is one-sided.
        expected, by_grid = arrays[f"{case}/{kind}_grad_grid"].copy(), np.array(by_grid)
        for array in (expected, by_grid):
            array[0, :2, :2] = 0
        np.testing.assert_allclose(by_grid, expected, atol=1e-5, rtol=1e-4, err_msg=case)


# --- Float64 loops, written from the definitions


def interpolate(line, out, align_corners):
    """A line of numbers, resized one position at a time."""
    n, result = len(line), np.zeros(out)
    for i in range(out):
        if align_corners:
            source = i * (n - 1) / (out - 1) if out > 1 else 0
        else:
            source = min(max((i + 0.5) * n / out - 0.5, 0), n - 1)
        low = min(int(source), n - 1)
        result[i] = line[low] + (source - low) * (line[min(low + 1, n - 1)] - line[low])
    return result


def each_axis(function, x):
    y = np.apply_along_axis(lambda line: function(line, 0), 1, x.astype(np.float64))
    return np.apply_along_axis(lambda line: function(line, 1), 2, y)


@settings(deadline=None, max_examples=10)
@given(sizes, sizes, sizes, sizes, st.booleans())
def test_resize_is_the_definition(h, w, oh, ow, align_corners):
    x = random(2, h, w, 3)
    y = resize_bilinear(x, (oh, ow), align_corners=align_corners)
    expected = each_axis(lambda line, axis: interpolate(line, (oh, ow)[axis], align_corners), x)
    np.testing.assert_allclose(y, expected, **EXACT)


@settings(deadline=None, max_examples=10)
@given(sizes, sizes, sizes, sizes)
def test_adaptive_pool_is_the_definition(h, w, oh, ow):
    def bins(line, out):
        n = len(line)
        return np.array([line[i * n // out : -(-(i + 1) * n // out)].mean() for i in range(out)])

    x = random(2, h, w, 3)
    expected = each_axis(lambda line, axis: bins(line, (oh, ow)[axis]), x)
    np.testing.assert_allclose(adaptive_avg_pool(x, (oh, ow)), expected, **EXACT)


def windows_of(x, window, stride, padding, fill):
    x = np.pad(x.astype(np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(x, (window, window), (1, 2))
    return views[:, ::stride, ::stride]


@settings(deadline=None, max_examples=6)
@given(sizes, sizes, st.sampled_from([(7, 1, 3), (3, 1, 1), (3, 2, 1), (2, 2, 0)]))
def test_pools_are_the_definition(h, w, shape):
    window, stride, padding = shape
    h, w = h + window, w + window
    x = random(2, h, w, 3) - 2
    expected = windows_of(x, *shape, 0).mean((-2, -1))
    np.testing.assert_allclose(avg_pool(x, *shape), expected, **EXACT)
    np.testing.assert_allclose(max_pool(x, *shape), windows_of(x, *shape, -np.inf).max((-2, -1)), **EXACT)
    probe = random(*expected.shape, seed=1)
    ours = gradient_of(lambda x: max_pool(x, *shape), x, probe)
    theirs = gradient_of(
        lambda x: nn.max_pool(x, (window, window), (stride, stride), ((padding, padding), (padding, padding))), x, probe
    )
    np.testing.assert_allclose(ours, theirs, **EXACT)


def test_max_pool_sends_the_gradient_to_the_first_of_equals():
    x = np.zeros((1, 4, 4, 1), np.float32)
    gradient = gradient_of(lambda x: max_pool(x, 2, 2, 0), x, np.arange(1.0, 5).reshape(1, 2, 2, 1))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])


# Products of the smallest numbers are flushed to zero, as everywhere in XLA.
values = st.floats(-100, 100, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)


@settings(deadline=None, max_examples=8)
@given(sizes, sizes, sizes, sizes, values)
def test_constants_and_means_are_preserved(h, w, oh, ow, value):
    x = np.full((1, h, w, 2), value, np.float32)
    for y in (resize_bilinear(x, (oh, ow)), adaptive_avg_pool(x, (oh, ow))):
        assert y.shape == (1, oh, ow, 2)
        np.testing.assert_allclose(y, value, rtol=1e-6)
    x = random(1, h, w, 2)
    np.testing.assert_allclose(adaptive_avg_pool(x, (1, 1))[0, 0, 0], x.mean((0, 1, 2)), atol=1e-6)


def test_resize_is_linear_in_the_middle_of_a_ramp():
    ramp = np.broadcast_to(np.arange(8.0, dtype=np.float32)[None, :, None, None], (1, 8, 8, 1))
    np.testing.assert_allclose(resize_bilinear(ramp, (32, 8))[0, 2:-2, 0, 0], (np.arange(2, 30) + 0.5) / 4 - 0.5)


def test_resampling_keeps_the_dtype():
    x = jnp.ones((1, 5, 6, 2), jnp.bfloat16)
    for y in (resize_bilinear(x, (9, 4)), adaptive_avg_pool(x, (2, 4)), adaptive_avg_pool(x, (5, 3)),
              avg_pool(x, 3, 1, 1), max_pool(x, 3, 2, 1), grid_sample(x, jnp.zeros((1, 2, 2, 2)))):  # fmt: skip
        assert y.dtype == jnp.bfloat16


def test_gradients_of_resampling_have_no_scatter():
    x = jnp.ones((1, 16, 16, 4))
    for function in (
        lambda x: resize_bilinear(x, (64, 64)),
        lambda x: adaptive_avg_pool(x, (3, 5)),
        lambda x: adaptive_avg_pool(x, (4, 4)),
        lambda x: avg_pool(x, 7, 1, 3),
        lambda x: max_pool(x, 3, 2, 1),
    ):
        program = str(jax.make_jaxpr(jax.grad(lambda x, f=function: f(x).sum()))(x))
        assert "scatter" not in program


def test_grid_sample_at_the_centres_is_the_identity():
    x = random(1, 4, 6, 2)
    for align_corners in (False, True):
        rows, columns = ((np.linspace(-1, 1, n) if align_corners else (2 * np.arange(n) + 1) / n - 1) for n in (4, 6))
        grid = np.stack(np.meshgrid(columns, rows), -1)[None].astype(np.float32)
        np.testing.assert_allclose(grid_sample(x, grid, align_corners=align_corners), x, **EXACT)
        np.testing.assert_array_equal(grid_sample(x, grid + 10, align_corners=align_corners), 0)


# --- Batch-norm


def normalise(x, momentum=0.9, train=True, dtype=jnp.float32, mutable=("batch_stats",)):
    norm = layers.BatchNorm(momentum, dtype=dtype)
    c = x.shape[-1]
    variables = {
        "params": {"scale": jnp.linspace(0.5, 2, c), "bias": jnp.linspace(-1, 1, c)},
        "batch_stats": {"mean": jnp.linspace(-1, 1, c), "var": jnp.linspace(1, 3, c)},
    }
    return variables, norm.apply(variables, x, train, mutable=list(mutable))


@pytest.mark.parametrize("momentum", [0.9, 0.05])
def test_batch_norm_in_training(momentum):
    x = random(2, 3, 5, 4) * [1, 2, 3, 0.1] + [0, 5, -3, 300]
    variables, (y, new) = normalise(x.astype(np.float32), momentum)
    x = x.astype(np.float32).astype(np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-3, rtol=1e-4)
    np.testing.assert_allclose(y[..., :3], expected[..., :3], atol=1e-5)
    old = variables["batch_stats"]
    unbiased = x.reshape(-1, 4).var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["mean"], momentum * old["mean"] + (1 - momentum) * mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], momentum * old["var"] + (1 - momentum) * unbiased, rtol=1e-4)


def test_batch_norm_in_inference_reads_the_running_statistics():
    x = random(2, 3, 5, 4)
    variables, (y, new) = normalise(x, train=False)
    stats, params = variables["batch_stats"], variables["params"]
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], stats)


def test_batch_norm_of_one_value_is_finite():
    variables, (y, new) = normalise(random(1, 1, 1, 4))
    np.testing.assert_allclose(y[0, 0, 0], variables["params"]["bias"], atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    gradient = jax.grad(lambda x: normalise(x)[1][0].sum())(random(1, 1, 1, 4))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_batch_norm_may_use_the_batch_without_keeping_it():
    x = random(2, 3, 5, 4)
    _, (y, new) = normalise(x, mutable=())
    assert not new
    np.testing.assert_array_equal(y, normalise(x)[1][0])


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    x = jnp.asarray(random(4, 16, 16, 4) + 100, jnp.bfloat16)
    _, (y, new) = normalise(x, 0.0, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], exact.reshape(-1, 4).var(0, ddof=1), rtol=1e-4)


# --- Convolutions


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 4), (1, 2, 1)])
def test_convolution_pads_like_torch(kernel, stride, dilation):
    module = layers.conv(2, kernel, stride=stride, dilation=dilation)
    x = random(1, 9, 10, 3)
    y, variables = module.init_with_output(jax.random.key(0), x)
    assert set(variables["params"]) == {"kernel"}
    weights = np.asarray(variables["params"]["kernel"], np.float64)
    pad = dilation * (kernel - 1) // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    span = dilation * (kernel - 1)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            r, c = i * stride, j * stride
            patch = padded[0, r : r + span + 1 : dilation, c : c + span + 1 : dilation]
            np.testing.assert_allclose(y[0, i, j], np.einsum("hwc,hwck->k", patch, weights), atol=1e-4)
    assert y.shape[1] == (9 + 2 * pad - span - 1) // stride + 1


def test_initial_scales():
    kernel = layers.kaiming_fan_out(jax.random.key(0), (3, 3, 64, 128))
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    kernel = layers.kaiming_fan_in(jax.random.key(0), (3, 3, 64, 128))
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 3), (1, 1, 2, 3), (7, 2)])
def test_the_gradient_of_batch_norm_is_that_of_its_definition(shape):
    def defined(x, scale, bias):
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = jnp.square(x - mean).mean(axes)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-5)) + bias

    rng = np.random.default_rng(len(shape))
    with jax.enable_x64(True):
        x, g = 3 * rng.standard_normal(shape) + 7, rng.standard_normal(shape)
        scale, bias = rng.standard_normal((2, shape[-1]))
        ours, back = jax.vjp(lambda *a: layers.normalised(*a, 1e-5)[0], x, scale, bias)
        theirs, their_back = jax.vjp(defined, x, scale, bias)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        for one, other in zip(back(g), their_back(g), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_no_gradient_flows_through_the_statistics():
    x, scale = jnp.arange(6.0).reshape(3, 2), jnp.ones(2)
    for i in (1, 2):
        of_x = jax.grad(lambda x, i=i: layers.normalised(x, scale, scale, 1e-5)[i].sum())(x)
        np.testing.assert_array_equal(of_x, 0)
