"""DLLR's network: the exchange by its definition, the sensors' channels, and one that is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.toy_variables import varied

from sarjax.models import build_network
from sarjax.models.dllr import FUSED, SENSORS
from sarjax.models.torchvision import encoders, layout, load_encoder
from sarjax.options import DLLR

SMALL = DLLR(width=1 / 16)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def started(groups=((1, 2), (0,))):
    x = np.random.default_rng(0).normal(size=(2, 64, 32, 3)).astype(np.float32)
    network = build_network(SMALL, 3).clone(groups=groups)
    return network, varied(network, x), x


@pytest.mark.parametrize("absent", ["", "sar", "optical"])
def test_the_exchange_is_its_definition(absent):
    network, variables, x = started()
    present = {m: jnp.array([1.0, 0.0 if m == absent else 1.0]) for m in SENSORS}

    @jax.jit
    def run(variables, x):
        views, state = network.apply(
            variables, x, False, present, method="views", capture_intermediates=True, mutable=["intermediates"]
        )
        return views, state["intermediates"]

    views, inner = run(variables, x)
    p = variables["params"]
    f = {m: views.embeddings[m] * present[m][:, None, None, None] for m in SENSORS}
    d = jnp.abs(f["optical"] @ p["difference_optical"]["kernel"][0, 0] - f["sar"] @ p["difference_sar"]["kernel"][0, 0])
    exchanged = []
    for m, other in (("optical", "sar"), ("sar", "optical")):
        kernel, bias = p[f"gate_{m}"]["kernel"], p[f"gate_{m}"]["bias"]
        dimensions = ("NHWC", "HWIO", "NHWC")
        gate = jax.lax.conv_general_dilated(
            jnp.concatenate([d, f[m]], -1), kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimensions
        )
        gate = jax.nn.sigmoid(gate + bias) * present[other][:, None, None, None]
        exchanged.append(f[m] + gate * (f[other] @ p[f"taken_{m}"]["kernel"][0, 0]))
    join = inner["join"]["conv"]["__call__"][0]
    expected = jax.lax.conv_general_dilated(
        jnp.concatenate(exchanged, -1), p["join"]["conv"]["kernel"], (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=dimensions,
    )  # fmt: skip
    np.testing.assert_allclose(join, expected, rtol=1e-3, atol=1e-4)
    fused = views.embeddings[FUSED] @ p["classifier"]["kernel"][0, 0] + p["classifier"]["bias"]
    np.testing.assert_allclose(views.logits[FUSED], fused, rtol=1e-4, atol=1e-4)


def test_each_sensor_sees_its_own_channels_and_its_head_that_alone():
    network, variables, x = started()
    views = jax.jit(lambda v, x: network.apply(v, x, False, method="views"))
    one = views(variables, x)
    for m, channels, other in (("sar", [0], "optical"), ("optical", [1, 2], "sar")):
        changed = x.copy()
        changed[..., channels] += 1
        two = views(variables, changed)
        np.testing.assert_array_equal(one.logits[other], two.logits[other])
        assert np.abs(one.logits[m] - two.logits[m]).max() > 1e-3
        assert np.abs(one.logits[FUSED] - two.logits[FUSED]).max() > 1e-3


def test_without_groups_both_see_everything():
    network, variables, x = started(groups=())
    assert {variables["params"][m]["encoder"]["conv1"]["kernel"].shape[2] for m in SENSORS} == {3}
    prediction = jax.jit(lambda v, x: network.apply(v, x, False))(variables, x)
    assert prediction.logits.shape == (2, 64, 32, 3)


def test_pretrained_weights_go_to_both_encoders(tmp_path):
    from safetensors.numpy import save_file

    _, variables, _ = started()
    r = np.random.default_rng(1)
    weights = {k: r.random(e.shape).astype(np.float32) for k, e in layout("resnet18", width=1 / 16).items()}
    save_file(weights, tmp_path / "r18.safetensors")
    loaded = load_encoder(variables, tmp_path / "r18.safetensors", SMALL)
    assert encoders(loaded["params"]) == [("optical", "encoder"), ("sar", "encoder")]
    name = next(k for k in weights if k.startswith("layer1") and k.endswith("conv1.weight"))
    path = ("layer1_0", "conv1", "kernel")
    for m in SENSORS:
        leaf = loaded["params"][m]["encoder"]
        for key in path:
            leaf = leaf[key]
        np.testing.assert_array_equal(leaf, weights[name].transpose(2, 3, 1, 0))
        assert loaded["params"][m]["encoder"]["conv1"]["kernel"].shape[2] == {"sar": 1, "optical": 2}[m]
