"""A padded image in strips over devices gives what the image alone gives, and only neighbouring rows travel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models.toy_variables import random_variables

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models import resampling as r
from sarjax.models.layers import conv
from sarjax.models.strips import strips
from sarjax.options import DHFA, FCN, Change, FCSiamDiff, LANet, PSPNet
from sarjax.train.collectives import collectives

KEY = jax.random.key(0)


def convolution(module, channels=3):
    variables = module.init(KEY, jnp.zeros((1, 8, 8, channels)))
    return lambda x: module.apply(variables, x)


# name -> (what is done to a map, whether its result has rows of padding)
OPERATIONS = {
    "3x3": (convolution(conv(2, 3)), True),
    "7x7, stride 2": (convolution(conv(2, 7, stride=2)), True),
    "1x1, stride 2, after 3x3": (convolution(nn.Sequential([conv(3, 3), conv(2, 1, stride=2)])), True),
    "dilated": (convolution(conv(2, 3, dilation=5)), True),
    "transposed": (convolution(nn.ConvTranspose(2, (3, 3), (2, 2), ((1, 2), (1, 2)))), True),
    "max pool": (lambda x: r.max_pool(r.max_pool(x - 9, 3, 1, 1), 3, 2, 1), True),
    "mean pool": (lambda x: r.avg_pool(x, 7, 1, 3), True),
    "patches": (lambda x: r.resize_bilinear(r.patch_means(x, 2), x.shape[1:3]), True),
    "enlarged by 2": (lambda x: r.resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2])), True),
    "enlarged by 3 and 16": (lambda x: r.resize_bilinear(x, (3 * x.shape[1], 16 * x.shape[2])), True),
    "bins": (lambda x: r.adaptive_avg_pool(x, (3, 2)), False),
    "more bins than rows": (
        lambda x: r.resize_bilinear(r.adaptive_avg_pool(x, (40, 1)), x.shape[1:3], bins=True),
        True,
    ),
    "moved samples": (lambda x: r.offset_sample(x, jnp.ones((*x.shape[:3], 2)) * jnp.array([0.3, 1.7])), True),
}


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=3, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4))
def test_an_operation_leaves_the_padding_out(name, half, more, width):
    """Whatever lies there; heights are multiples of 2, which all strides and patches here are."""
    operation, padded = OPERATIONS[name]
    image = np.random.default_rng(half).normal(size=(2, 2 * half, 2 * width, 3)).astype(np.float32)
    x = np.concatenate([image, np.full((2, 2 * more, 2 * width, 3), 1e4, np.float32)], 1)
    expected = operation(image)
    with strips(2 * half, 2 * (half + more)):
        found = operation(x)
    if padded:
        assert found.shape[1] * half == expected.shape[1] * (half + more)
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(operation(image), expected, err_msg="outside nothing has changed")


def test_what_is_jitted_inside_sees_its_rows():
    pool = jax.jit(lambda x: r.max_pool(x, 3, 2, 1))
    x = jnp.arange(16.0).reshape(1, 16, 1, 1)
    found = [pool(x)]
    for rows in (8, 12):
        with strips(rows, 16):
            found.append(pool(x))
    np.testing.assert_array_equal([y[0, 3, 0, 0] for y in found], [7, 7, 7])
    np.testing.assert_array_equal([y[0, 4, 0, 0] for y in found], [9, 7, 9])


def test_what_cannot_be_in_strips():
    x = jnp.zeros((1, 8, 4, 2))
    with strips(6, 8):
        for refused in (
            lambda: r.resize_bilinear(x, (16, 8), align_corners=True),
            lambda: r.grid_sample(x, jnp.zeros((1, 8, 4, 2)), align_corners=True),
        ):
            with pytest.raises(UserError, match=r"corner_aligned.*: windows, without --mesh.space"):
                refused()
        with pytest.raises(ValueError, match="whole factor"):
            r.resize_bilinear(x, (12, 8))
        with pytest.raises(ValueError, match="a map of 7 rows"):
            r.max_pool(x[:, :7], 3, 2, 1)
        with pytest.raises(ValueError, match="patches of 3"):
            r.patch_means(x, 3)
    with pytest.raises(ValueError, match="cannot be padded"), strips(8, 6):
        pass


def over_devices(network, variables, x, rows, n):
    """(logits of the first `rows` rows, the compiled program) of `x` in n strips."""
    mesh = jax.make_mesh((n,), ("space",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    whole, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "space"))
    alignment = network.context.alignment
    padded = -(-rows // (n * alignment)) * n * alignment

    def logits(variables, x):
        with strips(rows, padded):
            return network.apply(variables, x, False).logits

    # What lies in the padding must not matter.
    x = np.concatenate([x, np.full((len(x), padded - rows, *x.shape[2:]), 1e3, np.float32)], 1)
    args = jax.device_put(variables, whole), jax.device_put(x, by_rows)
    compiled = jax.jit(logits, out_shardings=by_rows).lower(*args).compile()
    return np.asarray(compiled(*args))[:, :rows], compiled


def case(options, rows, columns):
    network = build_network(options, 4)
    a = network.context.alignment
    x = np.random.default_rng(3).normal(size=(1, rows * a, columns * a, 2)).astype(np.float32)
    variables = random_variables(network, x)
    return network, variables, x, np.asarray(jax.jit(lambda v, x: network.apply(v, x, False).logits)(variables, x))


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("options", "devices"), [(LANet(width=1 / 16), (1, 2, 4, 8)), (FCN(width=1 / 16, stages=2), (1, 8))]
)
def test_over_devices_as_on_one(options, devices):
    """Eleven rows of patches, so that strips are ragged, and less memory on each of more devices."""
    network, variables, x, expected = case(options, 11, 3)
    memory = []
    for n in devices:
        found, compiled = over_devices(network, variables, x, x.shape[1], n)
        same(found, expected)
        only_neighbours(compiled, x, n)
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    # Strips of 11, 6, 3 and 2 rows of patches; but a single one has no padding to be left out.
    assert memory == sorted(memory, reverse=True)
    assert memory[-1] < 0.45 * memory[0], memory


def only_neighbours(compiled, x, n):
    """Of what travels nothing is more than a few rows: of 1/4 of the height and 4 channels, 8 of at most 32."""
    travels = collectives(compiled.as_text())
    assert {one.kind for one in travels} <= {"collective-permute"}
    assert (n > 1) == bool(travels)
    for one in travels:
        assert np.prod(one.shape) <= 8 * (x.shape[2] // 4) * 32


def test_an_image_shorter_than_its_strips():
    """Two rows of patches on eight devices: six hold nothing of the image."""
    network, variables, x, expected = case(LANet(width=1 / 16), 2, 2)
    found, _ = over_devices(network, variables, x, x.shape[1], 8)
    same(found, expected)


@pytest.mark.parametrize("options", [Change(width=1 / 16, channels=32), FCSiamDiff(width=1 / 4)])
def test_other_networks_that_look_so_far(options):
    network, variables, x, expected = case(options, 5, 2)
    found, compiled = over_devices(network, variables, x, x.shape[1], 4)
    same(found, expected)
    assert {one.kind for one in collectives(compiled.as_text())} == {"collective-permute"}


@pytest.mark.parametrize(
    "options",
    [
        LANet(width=1 / 16, low_window=0, high_window=0),
        PSPNet(width=1 / 16, channels=32),
        DHFA(width=1 / 16, channels=32),
    ],
    ids=lambda options: options.NAME,
)
def test_means_of_the_whole_image_leave_the_padding_out(options):
    network, variables, x, expected = case(options, 5, 2)
    assert network.context.radius is None
    found, _ = over_devices(network, variables, x, x.shape[1], 4)
    same(found, expected)
