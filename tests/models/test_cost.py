"""Costs: the published table to the printed digit, a count by hand, and XLA's own numbers."""

import json

import flax.linen as nn
import pytest

from sarjax import cli
from sarjax.models import NETWORKS, build_network
from sarjax.models.cost import VARIANTS, cost, count, model_table
from sarjax.models.layers import AdaptiveAvgPool, AvgPool, BatchNorm, PReLU, ReLU, Sigmoid, conv
from sarjax.models.published import ROWS, table2
from sarjax.models.resnet import ResNet
from sarjax.options import FCN, LANet, NetworkOptions


def row(oracle, start):
    _, description = oracle("table2_costs")
    rows = [row for row in description["rows"] if row["name"].startswith(start)]
    (found,) = [row for row in rows if row["name"] == start] or rows
    return found


def check(counted, expected):
    assert counted.parameters == expected["params"]
    for ours, printed in ((counted.memory_mb, expected["memory"]), (counted.flops / 1e9, expected["flops_G"])):
        digits = len(str(printed).partition(".")[2])
        assert ours == pytest.approx(printed, abs=0.5001 * 10**-digits)


@pytest.mark.parametrize(("start", "classes", "windows"), [
    ("LANet-R18/layer3, n=7", 7, (8, 2)),
    ("LANet-R18/layer3, n=8", 8, (10, 2)),
    ("LANet with 1x1 pooling grids (SE-like), n=7", 7, (64, 16)),
    ("LANet with 1x1 pooling grids (SE-like), n=7", 7, (0, 0)),
    ("LANet with 1x1 pooling grids (SE-like), n=8", 8, (0, 0)),
])  # fmt: skip
def test_lanet_costs_what_the_table_says(oracle, start, classes, windows):
    options = LANet(low_window=windows[0], high_window=windows[1])
    check(cost(options, classes, 3, 256, xla=False), row(oracle, start))


@pytest.mark.parametrize(("start", "system", "classes", "read"), [
    ("DeepLabv3 R50 OS16", "Deeplabv3", 8, False),
    ("same, but each layer4 block has two own ReLU", "Deeplabv3", 8, True),
    ("same, n=7 (no ASPP bias)", "Deeplabv3", 7, True),
    ("PSPNet (Lextal layout)", "PSPNet", 8, True),
    ("same, n=7", "PSPNet", 7, True),
])  # fmt: skip
def test_larger_networks_cost_what_the_table_says(oracle, start, system, classes, read):
    (published,) = [row for row in ROWS if row.system == system]
    reading = published.reading if read else list
    check(count(build_network(published.options, classes), 256, 3, reading), row(oracle, start))


def test_dropouts_and_the_log_softmax_are_what_ours_leaves_out():
    """4 + 16 + 2 MiB of outputs, and no operation."""
    (published,) = [row for row in ROWS if row.system == "PSPNet"]
    network = build_network(published.options, 8)
    ours, theirs = count(network, 256, 3), count(network, 256, 3, published.reading)
    assert theirs == (ours.parameters, ours.memory_mb + 22, ours.flops)


def test_table2_says_what_fits_and_what_does_not(oracle):
    """No digit is claimed that is not printed: LANet and DeepLabv3 fit; one figure of each of the others does not."""
    rows = {row["system"]: row for row in table2()}
    assert {system: (row["classes"], *row["difference"].values()) for system, row in rows.items()} == {
        "FCN+SE": (7, 0, -0.1, 0),
        "Deeplabv3": (8, 0, 0, 0),
        "PSPNet": (8, -0.06, 0, 0),
        "LANet": (7, 0, 0, 0),
        "our method": (7, 0, 0, 0),
    }
    assert {system: (row["parameters"], round(row["memory_mb"], 3)) for system, row in rows.items()} == {
        "FCN+SE": (2_826_390, 35.766),
        "Deeplabv3": (39_045_192, 164.269),
        "PSPNet": (53_317_323, 428.781),
        "LANet": (2_826_390, 35.870),
        "our method": (2_909_984, 35.873),
    }
    known = NetworkOptions.registry() | VARIANTS
    assert all(row.network in known and build_network(row.options, row.classes) for row in ROWS)
    _, description = oracle("table2_costs")
    assert all(list(row["printed"].values()) == description["paper"][system] for system, row in rows.items())


def test_the_command_line_shows_the_table(monkeypatch, capsys):
    rows = [{"name": n, "parameters": 1, "memory_mb": 1, "flops": 1, "xla_flops": 1, "xla_peak_bytes": 1}
            for n in ("fcn", "pspnet")]  # fmt: skip
    monkeypatch.setattr(cli.common, "devices", lambda host_devices=0: None)
    monkeypatch.setattr("sarjax.models.cost.model_table", lambda **asked: rows)
    cli.models(json=True)
    fcn, pspnet = json.loads(capsys.readouterr().out)
    assert fcn["table2"] == []
    (published,) = pspnet["table2"]
    assert published["printed"] == {"parameters": 53.38, "memory": 428.78, "flops": 50.51}
    assert published["difference"] == {"parameters": -0.06, "memory": 0, "flops": 0}
    cli.models()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "FCN+SE fcn_se 7 2.826 35.766 (-0.10) 1.870" in lines
    assert "Deeplabv3 deeplabv3 8 39.045 164.269 11.993" in lines
    assert "PSPNet pspnet 8 53.317 (-0.06) 428.781 50.507" in lines
    assert "LANet lanet_r18 7 2.826 35.870 1.870" in lines
    assert "our method lanet_r18 7 2.910 35.873 1.870" in lines


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
    """Leaves of all kinds but a max-pool, a ReLU called twice, and functions, which are free."""

    @nn.compact
    def __call__(self, x, train):
        relu = ReLU()
        x = relu(BatchNorm()(conv(4, 3, stride=2, bias=True)(x), train))
        x = nn.relu(x) + x
        x = relu(AvgPool(2, 2)(x))
        x = PReLU()(AdaptiveAvgPool(3)(x)[:, :2, :2])
        return nn.Dense(5)(Sigmoid()(x).reshape(1, -1))


def test_count_by_hand():
    counted = count(Small(), 8, 3)
    convolution, norm, relu, pool, sigmoid, dense = 4 * 4 * 4, 4 * 4 * 4, 2 * 2 * 4, 2 * 2 * 4, 2 * 2 * 4, 5
    bins, prelu = 3 * 3 * 4, 2 * 2 * 4
    assert counted.parameters == (9 * 3 * 4 + 4) + 8 + 1 + (16 * 5 + 5)
    assert counted.memory_mb == 4 * (convolution + norm + relu + pool + bins + prelu + sigmoid + dense) / 2**20
    assert counted.flops == convolution * (27 + 1) + 2 * norm + relu + norm + prelu + 16 * 5


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
