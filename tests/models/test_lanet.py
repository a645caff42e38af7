"""LANet: against the public code's numbers, and its switches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from models.toy_variables import attention_paths, conv_paths, fill, nhwc, norm_paths, random_variables, tiny

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models.lanet import AttentionEmbedding, PatchAttention
from sarjax.models.resampling import resize_bilinear
from sarjax.models.torchvision import layout
from sarjax.options import LANet

FORWARD = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT = {"atol": 1e-4, "rtol": 1e-3}
SMALL = LANet(width=1 / 8)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


# --- The modules


@pytest.mark.parametrize("case", [f"pam0{i}" for i in range(9)] + [f"aem0{i}" for i in range(5)])
def test_module_equals_the_public_code(oracle, case):
    arrays, description = oracle("lanet_modules")
    about = description["cases"][case]
    if case.startswith("pam"):
        inputs, prefix, first = ("x",), "SA", 0
        module = PatchAttention(about["pool_window"], about["reduction"], residual=about["add_input"])
    else:
        inputs, prefix, first = ("high", "low"), "SE", 1
        module = AttentionEmbedding(about["reduction"], about["pool_window"], residual=about["add_input"])
    paths = attention_paths("attention", prefix, first)
    variables = fill({path: arrays[f"{case}/state/{key}"] for path, key in paths.items()})
    x = [nhwc(arrays[f"{case}/{name}"]) for name in inputs]

    y = jax.jit(lambda v, *x: module.apply(v, *x, False))(variables, *x)
    np.testing.assert_allclose(y, nhwc(arrays[f"{case}/eval/output"]), **FORWARD)
    if about["eval_only"]:
        return

    def objective(params, stats, x, probe):
        y, new = module.apply({"params": params, "batch_stats": stats}, *x, True, mutable=["batch_stats"])
        return (y * probe).sum(), (y, new)

    (by_params, by_x), (y, new) = jax.jit(jax.grad(objective, (0, 2), has_aux=True))(
        variables["params"], variables["batch_stats"], x, nhwc(arrays[f"{case}/train/probe"])
    )
    np.testing.assert_allclose(y, nhwc(arrays[f"{case}/train/output"]), **FORWARD)
    for name, gradient in zip(inputs, by_x, strict=True):
        np.testing.assert_allclose(gradient, nhwc(arrays[f"{case}/train/grad_{name}"]), **GRADIENT, err_msg=name)
    after = traverse_util.flatten_dict({"params": by_params, **new})
    for path, key in paths.items():
        if path[0] == "params":
            expected = fill({path: arrays[f"{case}/train/grad_state/{key}"]})
            expected, tolerance = traverse_util.flatten_dict(expected)[path], GRADIENT
        else:
            expected, tolerance = arrays[f"{case}/train/new_running/{key}"], FORWARD
        np.testing.assert_allclose(after[path], expected, **tolerance, err_msg=key)


def test_patches_smaller_than_the_window_are_one_patch():
    module = PatchAttention(window=8, reduction=2)
    x = np.ones((1, 5, 3, 4), np.float32)
    y = jax.jit(lambda v: module.apply(v, x, False))(random_variables(module, x))
    assert y.shape == (1, 5, 3, 4)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1, :1], y.shape), rtol=1e-6)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 3), (1, 1)])
def test_a_window_of_0_is_squeeze_and_excitation(h, w):
    """x + x * sigmoid(W2 relu(bn(W1 mean x + b1)) + b2), in float64."""
    module = PatchAttention(window=0, reduction=2)
    x = np.random.default_rng(0).normal(size=(2, h, w, 4)).astype(np.float32)
    variables = random_variables(module, x)
    leaves = variables["params"]["attention"]
    hidden = np.maximum(x.astype(np.float64).mean((1, 2)) @ leaves["down"]["kernel"][0, 0] / np.sqrt(1 + 1e-5), 0)
    weight = 1 / (1 + np.exp(-hidden @ leaves["up"]["kernel"][0, 0]))
    y = jax.jit(lambda v, x: module.apply(v, x, False))(variables, x)
    np.testing.assert_allclose(y, x * (1 + weight[:, None, None]), rtol=1e-5, atol=1e-6)


def test_windows_of_0_are_patches_as_large_as_the_image():
    _, variables, x = tiny(SMALL, shape=(1, 64, 64, 2))

    @jax.jit
    def logits(variables, x):
        options = (dataclasses.replace(SMALL, low_window=w, high_window=v) for w, v in ((0, 0), (16, 4), (8, 2)))
        return [build_network(o, 3).apply(variables, x, False).logits for o in options]

    whole, large, small = logits(variables, x)
    np.testing.assert_allclose(whole, large, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(whole - small).max()) > 1e-3


@pytest.mark.parametrize("name", ["low_window", "high_window"])
def test_windows_are_not_negative(name):
    with pytest.raises(UserError, match=f"{name} is -1"):
        build_network(LANet(**{name: -1}), 3)


@pytest.mark.parametrize("train", [False, True])
def test_residual_adds_the_input(train):
    rng = np.random.default_rng(0)
    x, high = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 4), (2, 4, 4, 6)))
    for kind, arguments, inputs in ((PatchAttention, (2, 2), (x,)), (AttentionEmbedding, (2,), (high, x))):
        variables = random_variables(kind(*arguments), *inputs)

        @jax.jit
        def outputs(variables, *inputs, kind=kind, arguments=arguments):
            return [
                kind(*arguments, residual=residual).apply(variables, *inputs, train, mutable=["batch_stats"])[0]
                for residual in (True, False)
            ]

        with_input, without = outputs(variables, *inputs)
        np.testing.assert_allclose(with_input, without + x, atol=1e-6)
        assert np.all(np.abs(without) < np.abs(x))


# --- The network


def public_paths():
    paths = {}
    for key, entry in layout("resnet18", stages=3).items():
        stem = {"conv1": "layer0.0", "bn1": "layer0.1"}
        module, _, rest = key.partition(".")
        paths[(entry.collection, "encoder", *entry.path)] = f"FCN.{stem.get(module, module)}.{rest}"
    return (
        paths
        | conv_paths("high_conv", "FCN.head.0", bias=False)
        | norm_paths("high_bn", "FCN.head.1")
        | attention_paths("high_attention/attention", "PA2.SA", 0)
        | conv_paths("low_conv", "PA0.0")
        | norm_paths("low_bn", "PA0.1")
        | attention_paths("low_attention/attention", "PA0.3.SA", 0)
        | attention_paths("embedding/attention", "AE.SE", 1)
        | conv_paths("low_classifier", "classifier0")
        | conv_paths("high_classifier", "classifier1")
    )


@pytest.mark.parametrize("case", ["official", "residual"])
def test_network_equals_the_public_code(oracle, case):
    arrays, description = oracle("lanet_r18")
    network = build_network(LANet(residual=description["cases"][case]["aem_add_input"]), 7)
    paths = public_paths()
    assert {f"state/{key}" for key in paths.values()} == {key for key in arrays if key.startswith("state/")}
    variables = fill({path: arrays[f"state/{key}"] for path, key in paths.items()})
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == description["cases"][case]["params"]
    x = nhwc(arrays["image"]).astype(np.float32) / 127.5 - 1
    prediction, state = jax.jit(lambda v, x: network.apply(v, x, False, capture_intermediates=True))(variables, x)
    inner = {name: value["__call__"][0] for name, value in state["intermediates"].items() if "__call__" in value}
    logits = np.asarray(prediction.logits)
    np.testing.assert_allclose(logits[0], np.moveaxis(arrays[f"{case}/logits"], 0, -1), rtol=0, atol=3e-4)
    np.testing.assert_allclose(logits[1, ::4, ::4], np.moveaxis(arrays[f"{case}/logits_sub"], 0, -1), rtol=0, atol=3e-4)
    margin = np.diff(np.sort(logits, -1)[..., -2:])[..., 0]
    differs = logits.argmax(-1) != arrays[f"{case}/argmax"]
    assert not np.any(differs & (margin >= 1e-3))
    np.testing.assert_allclose(inner["high_classifier"], nhwc(arrays[f"{case}/high_logits_s"]), rtol=0, atol=3e-4)
    np.testing.assert_allclose(
        inner["low_classifier"][-1], np.moveaxis(arrays[f"{case}/low_logits_q"], 0, -1), rtol=0, atol=3e-4
    )
    np.testing.assert_allclose(
        prediction.auxiliary, resize_bilinear(inner["high_classifier"], (256, 256)), rtol=0, atol=1e-5
    )
    for name, array in (
        ("intermediate/layer3_0", prediction.features[16]),
        ("intermediate/pam_high_0", inner["high_attention"]),
    ):
        expected = np.moveaxis(arrays[name], 0, -1)
        np.testing.assert_allclose(array[0, ::2, ::2], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_embedding_does_not_train_the_high_branch():
    """Nor the encoder's last stage, which the low logits reach through the high branch only."""
    network, variables, x = tiny(SMALL, shape=(2, 32, 32, 2))
    heads = {name: leaves for name, leaves in variables["params"].items() if name != "encoder"}

    def low_logits(heads):
        params = {**heads, "encoder": variables["params"]["encoder"]}
        prediction, _ = network.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.square(prediction.logits - prediction.auxiliary).sum()

    for name, leaves in jax.jit(jax.grad(low_logits))(heads).items():
        size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(leaves))
        # high + low - high leaves rounding errors only.
        assert size < 1e-3 if name.startswith("high") else size > 1e-3, name


def test_momenta():
    """The heads follow the batch (0.05 kept), the encoder follows slowly (0.9 kept)."""
    network, variables, x = tiny(SMALL, shape=(2, 32, 32, 2))
    later = {"params": variables["params"], "batch_stats": jax.tree.map(lambda s: s + 1, variables["batch_stats"])}
    train = jax.jit(lambda v: network.apply(v, x, True, mutable=["batch_stats"])[1])
    kept = jax.tree.map(lambda a, b: b - a, train(variables)["batch_stats"], train(later)["batch_stats"])
    for path, share in traverse_util.flatten_dict(kept).items():
        np.testing.assert_allclose(share, 0.9 if path[0] == "encoder" else 0.05, atol=1e-4, err_msg=str(path))


def test_the_residual_switch_is_the_embeddings():
    _, variables, x = tiny(SMALL, shape=(1, 32, 32, 2))

    @jax.jit
    def inner(variables):
        outputs = {}
        for residual in (True, False):
            network = build_network(LANet(width=1 / 8, residual=residual), 3)
            _, state = network.apply(variables, x, False, capture_intermediates=True)
            state = state["intermediates"]
            outputs[residual] = {name: state[name]["__call__"][0] for name in ("low_attention", "embedding")}
        return outputs

    found = inner(variables)
    np.testing.assert_array_equal(found[True]["low_attention"], found[False]["low_attention"])
    np.testing.assert_allclose(
        found[True]["embedding"], found[False]["embedding"] + found[False]["low_attention"], atol=1e-6
    )


def test_channels_scale_with_the_width():
    params = traverse_util.flatten_dict(tiny(SMALL)[1]["params"])
    shapes = {path: leaf.shape for path, leaf in params.items()}
    assert shapes["low_conv", "kernel"] == (1, 1, 8, 8)
    assert shapes["high_conv", "kernel"] == (1, 1, 32, 16)
    assert ("high_conv", "bias") not in shapes
    assert shapes["low_attention", "attention", "down", "kernel"] == (1, 1, 8, 1)
