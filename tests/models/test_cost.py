"""Costs: the published table to the printed digit, a count by hand, and XLA's own numbers."""

import flax.linen as nn
import pytest

from sarjax.models import NETWORKS
from sarjax.models.cost import cost, count, model_table
from sarjax.models.layers import AvgPool, BatchNorm, ReLU, Sigmoid, conv
from sarjax.models.resnet import ResNet
from sarjax.options import FCN, LANet


def row(oracle, start):
    _, description = oracle("table2_costs")
    (found,) = [row for row in description["rows"] if row["name"].startswith(start)]
    return found


def check(counted, expected):
    assert counted.parameters == expected["params"]
    assert round(counted.memory_mb, 4) == pytest.approx(expected["memory"], abs=5e-5)
    assert round(counted.flops / 1e9, 4) == pytest.approx(expected["flops_G"], abs=5e-5)


@pytest.mark.parametrize(("start", "classes", "windows"), [
    ("LANet-R18/layer3, n=7", 7, (8, 2)),
    ("LANet-R18/layer3, n=8", 8, (10, 2)),
    ("LANet with 1x1 pooling grids (SE-like), n=7", 7, (64, 16)),
    ("LANet with 1x1 pooling grids (SE-like), n=8", 8, (64, 16)),
])  # fmt: skip
def test_lanet_costs_what_the_table_says(oracle, start, classes, windows):
    options = LANet(low_window=windows[0], high_window=windows[1])
    check(cost(options, classes, 3, 256, xla=False), row(oracle, start))


@pytest.mark.parametrize(("start", "encoder", "stages"), [
    ("ResNet-18 trunk", "resnet18", 3), ("ResNet-50 trunk", "resnet50", 4),
])  # fmt: skip
def test_trunks_cost_what_the_table_says(oracle, start, encoder, stages):
    check(count(ResNet(encoder, stages=stages), 256, 3), row(oracle, start))


def test_lanet_costs_what_the_paper_prints():
    """Cheng et al., Table 2: 2.83 M, 35.87 MB, 1.87 G. Needs no fixture."""
    found = cost(LANet(), 7, 3, 256, xla=False)
    assert found.parameters == 2_826_390
    assert f"{found.memory_mb:.3f} {found.flops / 1e9:.4f}" == "35.870 1.8701"


class Small(nn.Module):
    """One leaf of each kind, a ReLU called twice, and functions, which are free."""

    @nn.compact
    def __call__(self, x, train):
        relu = ReLU()
        x = relu(BatchNorm()(conv(4, 3, stride=2, bias=True)(x), train))
        x = nn.relu(x) + x
        x = relu(AvgPool(2, 2)(x))
        return nn.Dense(5)(Sigmoid()(x).reshape(1, -1))


def test_count_by_hand():
    counted = count(Small(), 8, 3)
    convolution, norm, relu, pool, sigmoid, dense = 4 * 4 * 4, 4 * 4 * 4, 2 * 2 * 4, 2 * 2 * 4, 2 * 2 * 4, 5
    assert counted.parameters == (9 * 3 * 4 + 4) + 8 + (16 * 5 + 5)
    assert counted.memory_mb == 4 * (convolution + norm + relu + pool + sigmoid + dense) / 2**20
    assert counted.flops == convolution * (27 + 1) + 2 * norm + relu + norm + 16 * 5


def test_xla_agrees_with_the_count():
    """XLA counts a multiply-accumulate as 2, and leaves out padding: so less than twice as much, but not by far."""
    found = cost(FCN(width=1 / 4), 3, 2, 64)
    assert 1.2 < found.xla_flops / found.flops < 2.2
    assert 4 * found.parameters < found.xla_peak_bytes < 4 * found.parameters + 40 * 2**20


def test_table_lists_every_network():
    rows = model_table(64, xla=False)
    assert [row["name"] for row in rows][: len(NETWORKS)] == list(NETWORKS)
    assert all(set(row) == {"name", "parameters", "memory_mb", "flops", "xla_flops", "xla_peak_bytes"} for row in rows)
    assert next(row for row in rows if row["name"] == "lanet_r18")["parameters"] == 2_826_390
