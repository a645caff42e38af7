"""DeepLabv3: its pyramid by the definition in float64, its widths, and what it refuses."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from models.toy_variables import tiny, varied

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models.deeplab import ASPP
from sarjax.options import DeepLabV3


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def dilated(x, kernel, rate):
    """A 3x3 (or 1x1) convolution, tap by tap: tap (i, j) reads rate * (i - 1) down and rate * (j - 1) to the right."""
    _, h, w, _ = x.shape
    reach = kernel.shape[0] // 2
    y = 0
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            shifted = np.zeros_like(x)
            rows, columns = (np.arange(n) + rate * step for n, step in ((h, i), (w, j)))
            inside = np.ix_(range(len(x)), (rows >= 0) & (rows < h), (columns >= 0) & (columns < w))
            source = np.ix_(range(len(x)), rows[(rows >= 0) & (rows < h)], columns[(columns >= 0) & (columns < w)])
            shifted[inside] = x[source]
            y = y + shifted @ kernel[i + reach, j + reach]
    return y


def part(x, variables, name, rate, train):
    """relu bn conv, with the statistics of the batch or the running ones."""
    leaves, running = variables["params"][name], variables["batch_stats"][name]["bn"]
    y = dilated(x, leaves["conv"]["kernel"].astype(np.float64), rate)
    mean, var = (y.mean((0, 1, 2)), y.var((0, 1, 2))) if train else (running["mean"], running["var"])
    return np.maximum((y - mean) / np.sqrt(var + 1e-5) * leaves["bn"]["scale"] + leaves["bn"]["bias"], 0)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("h", "w", "rates"), [(9, 14, (2, 3, 6)), (4, 5, (6,)), (1, 1, (1, 2))])
def test_pyramid_is_the_definition(h, w, rates, train):
    module = ASPP(3, rates)
    x = np.random.default_rng(0).normal(size=(4, h, w, 5)).astype(np.float32)
    variables = varied(module, x)
    y, _ = jax.jit(lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]))(variables, x)

    x = x.astype(np.float64)
    parts = [part(x, variables, "point", 1, train)]
    parts += [part(x, variables, f"rate_{i}", rate, train) for i, rate in enumerate(rates)]
    mean = part(x.mean((1, 2), keepdims=True), variables, "image", 1, train)
    parts.append(np.broadcast_to(mean, parts[0].shape))
    expected = part(np.concatenate(parts, -1), variables, "project", 1, train)
    assert expected.max() > 0.1
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 if train else 1e-5)


def test_a_batch_of_one_is_finite_in_training():
    """The norm of the image's mean has one value then: nothing is left of it but the norm's bias."""
    network, variables, x = tiny(DeepLabV3(encoder="resnet18", width=1 / 16), shape=(1, 32, 32, 2))
    prediction, new = jax.jit(lambda v, x: network.apply(v, x, True, mutable=["batch_stats"]))(variables, x)
    assert np.isfinite(prediction.logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_channels_scale_with_the_width():
    params = traverse_util.flatten_dict(tiny(DeepLabV3(width=1 / 8, rates=(6, 12)))[1]["params"])
    shapes = {"/".join(path[:-1]): leaf.shape for path, leaf in params.items() if path[-1] == "kernel"}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("encoder")} == {
        "aspp/point/conv": (1, 1, 256, 32),
        "aspp/rate_0/conv": (3, 3, 256, 32),
        "aspp/rate_1/conv": (3, 3, 256, 32),
        "aspp/image/conv": (1, 1, 256, 32),
        "aspp/project/conv": (1, 1, 128, 32),
        "classifier": (1, 1, 32, 3),
    }
    biases = {path[0] for path in params if path[-1] == "bias" and "bn" not in path[-2]}
    assert "classifier" in biases
    assert "aspp" not in biases


@pytest.mark.parametrize("rates", [(), (6, 0)])
def test_rates_are_from_1(rates):
    with pytest.raises(UserError, match=r"rates are \[.*whole numbers from 1"):
        build_network(DeepLabV3(rates=rates), 3)
