"""ResNet: against torchvision's numbers, its dilation rule and shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.toy_variables import fill, nhwc

from sarjax.models.resnet import ENCODERS, ResNet, channels_of
from sarjax.models.torchvision import layout


@pytest.mark.parametrize(("case", "output_stride"), [
    ("resnet18_w8_0", 32), ("resnet50_w8_1", 32), ("resnet50_w8_1", 16), ("resnet50_w8_1", 8), ("resnet18_w8_2", 32),
])  # fmt: skip
def test_equals_torchvision(oracle, case, output_stride):
    arrays, description = oracle("resnet")
    arch = description["cases"][case]["arch"]
    state = {k.removeprefix(f"{case}/state/"): arrays[k] for k in arrays if k.startswith(f"{case}/state/")}
    network = ResNet(arch, width=1 / 8, output_stride=output_stride)
    x = nhwc(arrays[f"{case}/x"])
    variables = fill({(e.collection, *e.path): state[key] for key, e in layout(arch, width=1 / 8).items()})
    with jax.default_matmul_precision("highest"):
        features = jax.jit(lambda v, x: network.apply(v, x, False))(variables, x)
    assert set(features) == {"stem", "c1", "c2", "c3", "c4"}
    names = {name: name.replace("c", "layer") for name in features}
    outputs = {name: f"{case}/out/{torch}" for name, torch in names.items()}
    if output_stride < 32:
        outputs = {name: f"{case}/os{output_stride}/{names[name]}" for name in ("c3", "c4")}
    for name, key in outputs.items():
        expected = nhwc(arrays[key])
        np.testing.assert_allclose(features[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    if output_stride == 32:
        pooled = np.asarray(features["c4"], np.float64).mean((1, 2))
        expected = arrays[f"{case}/out/pooled"]
        np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        expected = arrays[f"{case}/out/fc"]
        scores = pooled @ state["fc.weight"].T + state["fc.bias"]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def shapes_of(network, *shape):
    return jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x, False), jnp.zeros(shape))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_shapes(encoder, output_stride):
    network = ResNet(encoder, width=1 / 8, output_stride=output_stride)
    features, variables = shapes_of(network, 1, 65, 96, 2)
    assert variables["params"]["conv1"]["kernel"].shape == (7, 7, 2, 8)
    for stage, stride in network.strides.items():
        height, width = -(-65 // stride), 96 // stride
        assert features[stage].shape == (1, height, width, channels_of(encoder, 1 / 8, int(stage[1])))
    assert max(network.strides.values()) == output_stride
    assert features["stem"].shape == (1, 33, 48, 8)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_cut(stages):
    features, variables = shapes_of(ResNet("resnet18", stages=stages), 1, 32, 32, 3)
    assert set(features) == {"stem", *(f"c{i}" for i in range(1, stages + 1))}
    assert {name[:6] for name in variables["params"] if name[:5] == "layer"} == {
        f"layer{i}" for i in range(1, stages + 1)
    }


@pytest.mark.parametrize(("output_stride", "expected"), [
    (32, {1: (1, 1), 2: (1, 1), 3: (1, 1), 4: (1, 1)}),
    (16, {1: (1, 1), 2: (1, 1), 3: (1, 1), 4: (1, 2)}),
    (8, {1: (1, 1), 2: (1, 1), 3: (1, 2), 4: (2, 4)}),
])  # fmt: skip
def test_dilation_of_first_and_other_blocks(output_stride, expected):
    seen = {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.module.name == "conv2":
            seen[context.module.path[0]] = context.module.kernel_dilation
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        shapes_of(ResNet("resnet50", width=1 / 8, output_stride=output_stride), 1, 64, 64, 3)
    for stage, (first, others) in expected.items():
        assert seen[f"layer{stage}_0"] == first
        assert {d for name, d in seen.items() if name.startswith(f"layer{stage}_") and name[-2:] != "_0"} == {others}


def test_bfloat16_keeps_float32_parameters():
    features, variables = shapes_of(ResNet("resnet18", width=1 / 8, dtype=jnp.bfloat16), 1, 32, 32, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
