"""Networks that compare dates: one encoder for both, differences that have no order, and the published baseline."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from models.toy_variables import tiny, varied

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models.change import both_dates, dates_apart
from sarjax.models.cost import LEAVES, count, model_table
from sarjax.models.resnet import ResNet
from sarjax.options import Change, FCSiamDiff

SMALL = Change(width=1 / 16)


def apply(network, variables, x, train=False):
    if not train:
        return jax.jit(lambda v, x: network.apply(v, x, False))(variables, x)
    return jax.jit(lambda v, x: network.apply(v, x, True, mutable=["batch_stats"]))(variables, x)


def test_dates_become_rows_and_come_back():
    """Channels of the first date, then those of the second; both dates of a row stay beside each other."""
    x = np.arange(3 * 2 * 5 * 4, dtype=np.float32).reshape(3, 2, 5, 4)
    rows = np.asarray(both_dates(x))
    assert rows.shape == (6, 2, 5, 2)
    np.testing.assert_array_equal(rows[2], x[1, ..., :2])
    np.testing.assert_array_equal(rows[3], x[1, ..., 2:])
    apart = np.asarray(dates_apart({4: rows})[4])
    assert apart.shape == (3, 2, 2, 5, 2)
    np.testing.assert_array_equal(apart[1, 1], x[1, ..., 2:])


@pytest.mark.parametrize("train", [False, True])
def test_the_order_of_dates_does_not_matter(train):
    """Nor does it to the running statistics: one batch-norm sees both."""
    network, _, x = tiny(SMALL, shape=(2, 64, 32, 4))
    variables = varied(network, x)
    found, other = (apply(network, variables, y, train) for y in (x, np.concatenate([x[..., 2:], x[..., :2]], -1)))
    logits = [(y[0] if train else y).logits for y in (found, other)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    if train:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[1], other[1])
    # FC-Siam-diff's decoder starts from the later date.
    network, variables, _ = tiny(FCSiamDiff(width=0.25), shape=(2, 64, 32, 4))
    found, other = (apply(network, variables, y).logits for y in (x, np.concatenate([x[..., 2:], x[..., :2]], -1)))
    assert np.abs(found - other).max() > 1e-3


@pytest.mark.parametrize("options", [SMALL, dataclasses.replace(SMALL, difference="signed"), FCSiamDiff(width=0.25)])
def test_features_are_differences_of_one_encoder(options):
    network, _, x = tiny(options, shape=(2, 64, 32, 4))
    variables = varied(network, x)
    prediction = apply(network, variables, x)
    for stride, f in prediction.by_date.items():
        assert f.shape[:2] == (2, 2)
        change = f[:, 1] - f[:, 0]
        signed = getattr(options, "difference", "") == "signed"
        np.testing.assert_array_equal(prediction.features[stride], change if signed else np.abs(change))
    encoded = jax.jit(lambda v, x: network.apply(v, x, False, method="encode"))(variables, x)
    for stride, f in encoded.items():
        np.testing.assert_allclose(f, prediction.features[stride], rtol=1e-5, atol=1e-5)
    same = apply(network, variables, np.concatenate([x[..., :2]] * 2, -1))
    for stride, f in same.by_date.items():
        np.testing.assert_allclose(f[:, 0], prediction.by_date[stride][:, 0], rtol=1e-5, atol=1e-5)
        assert not same.features[stride].any(), "nothing changed"


def test_the_baseline_by_hand():
    """Layer by layer: the decoder starts from the later date's pooled features and reads differences."""
    network, _, x = tiny(FCSiamDiff(width=1 / 8), shape=(1, 32, 48, 2))
    variables = varied(network, x)
    params, stats = variables["params"], variables["batch_stats"]

    def conv(x, kernel, **how):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), **{"padding": "SAME"} | how, dimension_numbers=dims)

    def block(x, name):
        weights, norms = params[name], stats[name]
        for i in range(sum(key.startswith("conv") for key in weights)):
            x = conv(x, weights[f"conv_{i}"]["kernel"])
            bn, running = weights[f"bn_{i}"], norms[f"bn_{i}"]
            x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * bn["scale"] + bn["bias"]
            x = np.maximum(x, 0)
        return x

    def pool(x):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    dates = []
    for y in (x[..., :1], x[..., 1:]):
        features = []
        for i in range(4):
            y = block(pool(y) if i else y, f"stages_{i}")
            features.append(y)
        dates.append(features)
    y = pool(dates[1][3])
    for i in reversed(range(4)):
        spread = {"padding": ((1, 2), (1, 2)), "lhs_dilation": (2, 2)}
        up = conv(y, params[f"ups_{i}"]["kernel"], **spread) + params[f"ups_{i}"]["bias"]
        y = block(np.concatenate([up, np.abs(dates[0][i] - dates[1][i])], -1), f"back_{i}")
    y = conv(y, params["classifier"]["kernel"]) + params["classifier"]["bias"]
    np.testing.assert_allclose(apply(network, variables, x).logits, y, rtol=1e-3, atol=1e-4)


def test_a_transposed_convolution_counts_by_its_inputs():
    """9 products for each of 4 x 6 cells, 3 inputs and 5 outputs, and a bias for each of 8 x 12 x 5 results."""
    layer = nn.ConvTranspose(5, (3, 3), (2, 2), ((1, 2), (1, 2)))
    x = np.zeros((1, 4, 6, 3), np.float32)
    y = jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x)[0], x)
    assert y.shape == (1, 8, 12, 5)
    assert LEAVES[nn.ConvTranspose](layer, x, y) == 9 * 24 * 15 + 480


def test_the_baseline_has_the_published_number_of_parameters():
    """1,350,146 of the public code with 3 bands and 2 classes, of which 1,216 are biases in front of a batch-norm."""
    assert count(build_network(FCSiamDiff(), 2), 256, 6).parameters == 1_350_146 - 1_216


def test_costs_are_of_both_dates():
    """Twice the encoder's; `sarjax models` lists teachers and students of 3 bands each date."""
    rows = {row["name"]: row for row in model_table(64, xla=False)}
    assert {"change", "change_r50", "change_r34", "change_r18_half", "change_r18_quarter", "fc_siam_diff"} <= set(rows)
    assert rows["change_r18_quarter"]["flops"] < rows["change_r50"]["flops"] / 10
    assert rows["change"]["parameters"] == count(build_network(Change(), 7), 64, 6).parameters
    one, two = (count(build_network(Change(channels=c), 7), 64, 6).flops for c in (1, 2))
    encoder = count(ResNet(), 64, 3).flops
    assert 2 * encoder < one < two < 2.2 * encoder


def test_what_does_not_fit():
    with pytest.raises(UserError, match=r"compares 2 dates cannot read 3 channels: an even number fits"):
        tiny(SMALL, shape=(1, 32, 32, 3))
    with pytest.raises(UserError, match=r"network.encoder is of a ResNet, which 'fc_siam_diff' does not have"):
        build_network(FCSiamDiff(encoder="resnet50"), 2)
    with pytest.raises(UserError, match="channels is 0"):
        build_network(Change(channels=0), 2)
