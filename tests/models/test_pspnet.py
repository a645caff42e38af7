"""PSPNet: pyramid and upsampling by their definitions in float64, the auxiliary head, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from models.toy_variables import tiny, varied

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models.layers import PReLU
from sarjax.models.pspnet import PyramidPooling, Upsample
from sarjax.options import PSPNet

SMALL = {"encoder": "resnet18", "width": 1 / 16}


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def bilinear(x, size):
    """Between the four nearest centres, which lie at half-integers; beyond the outer ones it stays the same."""
    for axis, out in ((1, size[0]), (2, size[1])):
        n = x.shape[axis]
        source = np.clip((np.arange(out) + 0.5) * n / out - 0.5, 0, n - 1)
        low = np.floor(source).astype(int)
        share = (source - low).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        x = x.take(low, axis) * (1 - share) + x.take(np.minimum(low + 1, n - 1), axis) * share
    return x


@pytest.mark.parametrize(
    ("h", "w", "bins"), [(12, 6, (1, 2, 3, 6)), (7, 11, (1, 2, 3, 6)), (3, 4, (6, 5)), (1, 1, (2,))]
)
def test_pyramid_is_the_definition(h, w, bins):
    """Bin i of n covers floor(i * h / n) to ceil((i + 1) * h / n): bins overlap where n does not divide."""
    module = PyramidPooling(bins, 3)
    x = np.random.default_rng(0).normal(size=(2, h, w, 5)).astype(np.float32)
    variables = jax.jit(lambda x: module.init(jax.random.key(0), x))(x)
    y = jax.jit(module.apply)(variables, x)

    levels, params = [], jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    for i, n in enumerate(bins):
        means = np.empty((2, n, n, 5))
        for row in range(n):
            for column in range(n):
                rows = slice(row * h // n, -(-(row + 1) * h // n))
                columns = slice(column * w // n, -(-(column + 1) * w // n))
                means[:, row, column] = x[:, rows, columns].mean((1, 2), dtype=np.float64)
        levels.append(bilinear(means @ params[f"level_{i}"]["kernel"][0, 0], (h, w)))
    joined = np.concatenate([*levels, x.astype(np.float64)], -1)
    expected = np.maximum(joined @ params["bottleneck"]["kernel"][0, 0] + params["bottleneck"]["bias"], 0)
    assert expected.max() > 0.1
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_upsampling_is_the_definition(train):
    module, size = Upsample(4), (10, 7)
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)

    class Fixed:
        init = staticmethod(lambda key, x, train: module.init(key, x, size, train))

    variables = varied(Fixed, x)
    y, _ = jax.jit(lambda v, x: module.apply(v, x, size, train, mutable=["batch_stats"]))(variables, x)
    params, running = variables["params"], variables["batch_stats"]["bn"]
    padded = np.pad(bilinear(x.astype(np.float64), size), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["conv"]["kernel"]
    z = params["conv"]["bias"] + sum(
        padded[:, i : i + 10, j : j + 7] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    mean, var = (z.mean((0, 1, 2)), z.var((0, 1, 2))) if train else (running["mean"], running["var"])
    z = (z - mean) / np.sqrt(var + 1e-5) * params["bn"]["scale"] + params["bn"]["bias"]
    np.testing.assert_allclose(y, np.where(z > 0, z, params["prelu"]["slope"] * z), rtol=1e-4, atol=1e-5)


def test_prelu():
    x = jnp.asarray([-2.0, 0.0, 3.0])
    variables = PReLU().init(jax.random.key(0), x)
    assert variables["params"]["slope"].shape == (1,)
    np.testing.assert_array_equal(PReLU().apply(variables, x), [-0.5, 0, 3])
    gradient = jax.grad(lambda v: PReLU().apply(v, x).sum())(variables)
    np.testing.assert_array_equal(gradient["params"]["slope"], [-2])
    half = PReLU().apply(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_channels_scale_with_the_width():
    params = traverse_util.flatten_dict(tiny(PSPNet(width=1 / 32, bins=(1, 3), auxiliary=True))[1]["params"])
    shapes = {"/".join(path[:-1]): leaf.shape for path, leaf in params.items() if path[-1] == "kernel"}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("encoder")} == {
        "pyramid/level_0": (1, 1, 64, 64),
        "pyramid/level_1": (1, 1, 64, 64),
        "pyramid/bottleneck": (1, 1, 192, 32),
        "up_0/conv": (3, 3, 32, 8),
        "up_1/conv": (3, 3, 8, 2),
        "up_2/conv": (3, 3, 2, 2),
        "classifier": (1, 1, 2, 3),
        "auxiliary_conv": (3, 3, 32, 8),
        "auxiliary_classifier": (1, 1, 8, 3),
    }
    assert ("pyramid", "bottleneck", "bias") in params
    assert ("pyramid", "level_0", "bias") not in params


def test_the_auxiliary_head_reads_the_stage_before_the_last():
    """It adds its own parameters, changes no logits, and its gradient passes by the last stage and the pyramid."""
    network, variables, x = tiny(PSPNet(**SMALL, auxiliary=True), shape=(2, 32, 32, 2))
    own = {name: leaves for name, leaves in variables["params"].items() if name.startswith("auxiliary")}
    assert set(own) == {"auxiliary_conv", "auxiliary_bn", "auxiliary_classifier"}
    without = build_network(PSPNet(**SMALL), 3)
    rest = {
        collection: {name: leaves for name, leaves in tree.items() if not name.startswith("auxiliary")}
        for collection, tree in variables.items()
    }

    @jax.jit
    def outputs(variables, rest):
        def auxiliary(params):
            return jnp.square(network.apply({**variables, "params": params}, x, False).auxiliary).sum()

        return (
            network.apply(variables, x, False),
            without.apply(rest, x, False),
            jax.grad(auxiliary)(variables["params"]),
        )

    both, one, gradients = outputs(variables, rest)
    assert one.auxiliary is None
    np.testing.assert_allclose(both.logits, one.logits, rtol=1e-5, atol=1e-5)
    for path, gradient in traverse_util.flatten_dict(gradients).items():
        reached = path[0].startswith("auxiliary") or (path[0] == "encoder" and not path[1].startswith("layer4"))
        assert (np.abs(gradient).max() > 0) == reached, path


@pytest.mark.parametrize(("options", "message"), [
    ({"bins": ()}, r"bins are \[\], .* whole numbers from 1"),
    ({"bins": (1, 0)}, r"bins are \[1, 0\]"),
    ({"upsampling": (8, 8, 8, 8)}, "upsampling has 4 stages, but output stride 8 leaves room for 3"),
])  # fmt: skip
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        build_network(PSPNet(**options), 3)


@pytest.mark.parametrize(("options", "size", "expected"), [
    (PSPNet(**SMALL), (32, 48), [(8, 12), (16, 24), (32, 48)]),
    (PSPNet(**SMALL), (33, 50), [(9, 13), (17, 25), (33, 50)]),
    (PSPNet(**SMALL, output_stride=16, upsampling=(9, 9)), (3, 50), [(1, 7), (1, 13)]),
    (PSPNet(**SMALL, output_stride=16, upsampling=(9, 9, 9, 9)), (16, 32), [(2, 4), (4, 8), (8, 16), (16, 32)]),
    (PSPNet(**SMALL, upsampling=()), (33, 50), []),
])  # fmt: skip
def test_upsampling_doubles_up_to_the_size_of_the_input(options, size, expected):
    """Rounded up where the stride does not divide the input, as the encoder's own sizes are; the logits follow."""
    network = build_network(options, 3)
    x = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
    prediction, state = jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, False, capture_intermediates=True), x
    )
    inner = state["intermediates"]
    found = [inner[f"up_{i}"]["__call__"][0].shape[1:3] for i in range(len(options.upsampling))]
    assert found == expected
    assert f"up_{len(expected)}" not in inner
    assert prediction.logits.shape == (1, *size, 3)
