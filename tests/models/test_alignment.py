"""Sampling at offsets and flow alignment: definitions in float64, SFNet's numbers, and what zero offsets are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export
from models.toy_variables import conv_paths, fill, nhwc

from sarjax.models.dhfa import FlowAlignment, flow_sample
from sarjax.models.resampling import offset_sample, resize_bilinear
from sarjax.train.collectives import collectives

sizes = st.integers(1, 9)
CASES = [f"case{i:02d}" for i in range(5)]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loss_and_gradients(sample):
    """(x, offsets, probe) -> samples, and the gradients of sum(samples * probe)."""

    def loss(x, offsets, probe):
        y = sample(x, offsets)
        return (y * probe).sum(), y

    def run(x, offsets, probe):
        gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, offsets, probe)
        return y, *gradients

    return jax.jit(run)


offset_sampled = loss_and_gradients(offset_sample)


def slowly(x, offsets, probe):
    """The same as `offset_sampled` in float64, one sample at a time, from the definition."""
    (b, h, w, c), (_, oh, ow, _) = x.shape, offsets.shape
    x, offsets, probe = (a.astype(np.float64) for a in (x, offsets, probe))
    y, by_x, by_offsets = np.zeros((b, oh, ow, c)), np.zeros_like(x), np.zeros_like(offsets)
    for k, i, j in np.ndindex(b, oh, ow):
        across, down = offsets[k, i, j]
        row, column = (i + 0.5) * h / oh - 0.5 + down, (j + 0.5) * w / ow - 0.5 + across
        top, left = int(np.floor(row)), int(np.floor(column))
        for m, u, du in ((top, 1 - (row - top), -1), (top + 1, row - top, 1)):
            for n, v, dv in ((left, 1 - (column - left), -1), (left + 1, column - left, 1)):
                cell = k, min(max(m, 0), h - 1), min(max(n, 0), w - 1)
                y[k, i, j] += u * v * x[cell]
                by_x[cell] += u * v * probe[k, i, j]
                by_offsets[k, i, j] += (x[cell] @ probe[k, i, j]) * np.array([u * dv, v * du])
    return y, by_x, by_offsets


def check(x, offsets, probe, **tolerance):
    for ours, expected in zip(offset_sampled(x, offsets, probe), slowly(x, offsets, probe), strict=True):
        np.testing.assert_allclose(ours, expected, **tolerance)


@settings(deadline=None, max_examples=12)
@given(sizes, sizes, sizes, sizes, st.sampled_from([0.3, 3, 100]), st.integers(0, 99))
@example(1, 1, 1, 1, 3, 0)
@example(1, 1, 4, 3, 3, 0)
@example(5, 3, 1, 1, 3, 0)
@example(9, 5, 8, 11, 3, 0)
def test_offset_samples_are_the_definition(h, w, oh, ow, scale, seed):
    x, probe = random(2, h, w, 3, seed=seed), random(2, oh, ow, 3, seed=seed + 1)
    # No position is within rounding of a whole cell: there the gradient jumps.
    offsets = np.round(scale * random(2, oh, ow, 2, seed=seed + 2), 1) + np.float32(0.0123)
    check(x, offsets, probe, rtol=1e-4, atol=2e-5)


def test_positions_at_whole_cells_and_on_the_border():
    """Gradients are finite and those to the right and down; beyond the border the offset changes nothing."""
    x, probe = random(1, 4, 6, 2), random(1, 4, 6, 2, seed=1)
    steps = np.stack(np.meshgrid(np.arange(6) % 4 - 2, np.arange(4) - 1), -1)[None].astype(np.float32)
    check(x, steps, probe, rtol=1e-5, atol=1e-5)
    check(x, np.zeros_like(steps), probe, rtol=1e-5, atol=1e-5)
    line = np.array([5, 7, 11, 2], np.float32).reshape(1, 1, 4, 1)
    across = np.zeros((1, 1, 4, 2), np.float32)
    across[0, 0, :, 0] = [-0.5, 0.25, 2, 0]
    y, by_x, by_offsets = offset_sampled(line, across, np.ones((1, 1, 4, 1), np.float32))
    np.testing.assert_array_equal(y.ravel(), [5, 8, 2, 2])
    np.testing.assert_array_equal(by_x.ravel(), [1, 0.75, 0.25, 2])
    np.testing.assert_array_equal(by_offsets[0, 0], [[0, 0], [4, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize("far", [50.0, 1e9, 3e38, np.inf])
def test_far_samples_are_those_of_the_border(far):
    x, probe = random(1, 4, 6, 2), np.ones((1, 8, 12, 2), np.float32)
    signs = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]], np.float32)
    corners = np.stack([x[0, 0, 0], x[0, 0, -1], x[0, -1, 0], x[0, -1, -1]])
    for sign, corner in zip(signs, corners, strict=True):
        y, by_x, by_offsets = offset_sampled(x, np.broadcast_to(far * sign, (1, 8, 12, 2)), probe)
        np.testing.assert_allclose(y, np.broadcast_to(corner, y.shape), rtol=1e-6)
        np.testing.assert_array_equal(by_offsets, 0)
        assert np.isfinite(by_x).all()
        np.testing.assert_allclose(by_x.sum(), probe.sum(), rtol=1e-6)


@settings(deadline=None, max_examples=10)
@given(sizes, sizes, st.integers(1, 40), st.integers(1, 40))
@example(32, 32, 64, 64)
@example(9, 7, 17, 13)
@example(3, 5, 1, 1)
def test_zero_offsets_resize(h, w, oh, ow):
    x = random(2, h, w, 3)
    y = jax.jit(offset_sample)(x, np.zeros((2, oh, ow, 2), np.float32))
    # A few last places of values up to 4: the sums are those of resizing, rounded in another order.
    np.testing.assert_allclose(y, resize_bilinear(x, (oh, ow)), rtol=0, atol=1e-6)


def test_zero_offsets_resize_a_large_map():
    """Of positions in the tens of thousands float32 keeps two digits after the point: whole cells are counted apart."""
    x = random(1, 1, 20_000, 1)
    y = jax.jit(offset_sample)(x, np.zeros((1, 1, 30_000, 2), np.float32))
    np.testing.assert_allclose(y, resize_bilinear(x, (1, 30_000)), rtol=0, atol=2e-6)


def test_a_mirrored_map_and_offsets_give_a_mirrored_sample():
    x, offsets = random(2, 5, 7, 3), 2 * random(2, 9, 12, 2, seed=1)
    y = offset_sample(x, offsets)
    across = offset_sample(x[:, :, ::-1], offsets[:, :, ::-1] * np.array([-1, 1], np.float32))
    np.testing.assert_allclose(across, y[:, :, ::-1], rtol=0, atol=1e-5)
    down = offset_sample(x[:, ::-1], offsets[:, ::-1] * np.array([1, -1], np.float32))
    np.testing.assert_allclose(down, y[:, ::-1], rtol=0, atol=1e-5)


def test_bfloat16_maps_are_sampled_at_float32_positions():
    x = np.broadcast_to(np.arange(256, dtype=np.float32)[:, None], (1, 1, 256, 1))
    offsets = np.full((1, 1, 256, 2), 5.25, np.float32)
    y, by_x, _ = offset_sampled(x.astype(jnp.bfloat16), offsets, np.ones((1, 1, 256, 1), np.float32))
    assert (y.dtype, by_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(y, np.minimum(x + 5.25, 255).astype(jnp.bfloat16))
    # What the last cell gets from a hundred samples is summed in float32 and rounded once.
    _, by_x, _ = offset_sampled(x.astype(jnp.bfloat16), 0 * offsets + 1000, np.ones((1, 1, 256, 1), np.float32) / 3)
    assert float(by_x[0, 0, -1, 0]) == float(jnp.bfloat16(256 / 3))


@pytest.mark.parametrize("sample", [offset_sample, flow_sample])
def test_one_program_for_all_sizes(sample):
    b, h, w = export.symbolic_shape("b, h, w")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, h, w, 3), (b, 2 * h, 3 * w, 2))]
    program = export.export(jax.jit(sample))(*shapes)
    for h, w in ((4, 5), (1, 1), (3, 9)):
        x, offsets = random(2, h, w, 3), random(2, 2 * h, 3 * w, 2, seed=1)
        np.testing.assert_allclose(program.call(x, offsets), sample(x, offsets), rtol=0, atol=1e-5)


def test_a_sharded_batch_is_sampled_where_it_lies():
    """Neither samples nor gradients ask another device for anything."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    inputs = [random(8, *shape, seed=i) for i, shape in enumerate(((4, 5, 3), (8, 9, 2), (8, 9, 3)))]
    sharded = jax.device_put(inputs, rows)
    program = jax.jit(offset_sampled, in_shardings=(rows,) * 3, out_shardings=(rows,) * 3).lower(*sharded).compile()
    assert collectives(program.as_text()) == []
    for ours, expected in zip(program(*sharded), offset_sampled(*inputs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


# --- The module


@pytest.mark.parametrize("case", CASES)
def test_corner_aligned_equals_sfnet(oracle, case):
    arrays, description = oracle("flow_align")
    get = {key.removeprefix(f"{case}/"): array for key, array in arrays.items() if key.startswith(case)}
    keys = {"high": "down_h", "low": "down_l", "offsets": "flow_make"}
    paths = {path: key for name, theirs in keys.items() for path, key in conv_paths(name, theirs, bias=False).items()}
    variables = fill({path: get[f"state/{key}"] for path, key in paths.items()})
    module = FlowAlignment(description["cases"][case]["outplane"], corner_aligned=True)
    coarse, fine, probe = (nhwc(get[name]) for name in ("high", "low", "probe"))

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(params, coarse, fine):
        y, state = module.apply({"params": params}, coarse, fine, capture_intermediates=True)
        return (y * probe).sum(), (y, state["intermediates"]["offsets"]["__call__"][0])

    (by_params, by_coarse, by_fine), (y, flow) = gradients(variables["params"], coarse, fine)
    np.testing.assert_allclose(flow, nhwc(get["flow"]), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(y, nhwc(get["output"]), atol=2e-5, rtol=1e-4)
    expected = fill({path: get[f"grad_state/{key}"] for path, key in paths.items()})["params"]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-3), by_params, expected)
    np.testing.assert_allclose(by_coarse, nhwc(get["grad_high"]), atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(by_fine, nhwc(get["grad_low"]), atol=1e-4, rtol=1e-3)

    given = flow_sample(coarse, nhwc(get["given_flow"]))
    np.testing.assert_allclose(given, nhwc(get["given_flow_output"]), atol=2e-5, rtol=1e-4)
    zero = flow_sample(coarse, np.zeros_like(nhwc(get["flow"])))
    np.testing.assert_allclose(zero, nhwc(get["zero_flow_output"]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("corner_aligned", [False, True])
def test_alignment_starts_as_bilinear_upsampling(corner_aligned):
    coarse, fine = random(2, 5, 4, 6), random(2, 9, 8, 3, seed=1)
    module = FlowAlignment(4, corner_aligned)
    variables = module.init(jax.random.key(0), coarse, fine)
    assert {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"]).items()} == {
        "high/kernel": (1, 1, 6, 4), "low/kernel": (1, 1, 3, 4), "offsets/kernel": (3, 3, 8, 2)}  # fmt: skip
    y = module.apply(variables, coarse, fine)
    np.testing.assert_allclose(y, resize_bilinear(coarse, (9, 8), align_corners=corner_aligned), rtol=0, atol=2e-6)
    mirrored = module.apply(variables, coarse[:, ::-1, ::-1], fine[:, ::-1, ::-1])
    np.testing.assert_allclose(mirrored, y[:, ::-1, ::-1], rtol=0, atol=2e-6)


def test_the_offsets_are_those_of_both_maps():
    """By the definition: offsets of a 3x3 convolution over the upsampled coarse and the fine map, half-pixel grid."""
    coarse, fine, size = random(1, 3, 4, 5), random(1, 6, 7, 2, seed=1), (6, 7)
    module = FlowAlignment(4)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), coarse, fine))
    variables = jax.tree.map(lambda leaf: random(*leaf.shape, seed=2) / 3, shapes)
    y, state = module.apply(variables, coarse, fine, capture_intermediates=True)
    params = variables["params"]
    high = np.asarray(resize_bilinear(coarse, size)) @ params["high"]["kernel"][0, 0]
    joined = np.pad(np.concatenate([high, fine @ params["low"]["kernel"][0, 0]], -1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["offsets"]["kernel"]
    offsets = sum(joined[:, i : i + 6, j : j + 7] @ kernel[i, j] for i in range(3) for j in range(3))
    assert np.abs(offsets).max() > 1
    np.testing.assert_allclose(state["intermediates"]["offsets"]["__call__"][0], offsets, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, slowly(coarse, np.asarray(offsets), np.zeros(y.shape))[0], rtol=1e-4, atol=1e-5)


def test_offsets_are_float32_in_bfloat16():
    coarse, fine = (random(1, n, n, 4).astype(jnp.bfloat16) for n in (4, 8))
    module = FlowAlignment(4, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), coarse, fine)
    y, state = module.apply(variables, coarse, fine, capture_intermediates=True)
    inner = {name: calls["__call__"][0].dtype for name, calls in state["intermediates"].items() if name != "__call__"}
    assert inner == {"high": jnp.bfloat16, "low": jnp.bfloat16, "offsets": jnp.float32}
    assert y.dtype == jnp.bfloat16
