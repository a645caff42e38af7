"""DHFA-Net: the wiring of its pyramid by the definition, the start as a plain pyramid, and offsets that learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from models.toy_variables import tiny, varied

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models.dhfa import Hallucination, PyramidPooling
from sarjax.models.layers import ConvNormReLU, conv
from sarjax.models.resampling import adaptive_avg_pool, resize_bilinear
from sarjax.options import DHFA

SMALL = DHFA(width=1 / 16)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def of(variables, name):
    """The variables of one submodule."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def started(options, x):
    network = build_network(options, 3)
    return network, jax.jit(lambda x: network.init(jax.random.key(0), x, False))(x)


def shapes_of(network, x):
    return jax.eval_shape(lambda: network.init(jax.random.key(0), x, False))


def image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("alignment", "output_stride", "levels"), [("flow", 32, 4), ("none", 16, 3), ("flow", 8, 2)])
def test_wiring_is_the_definition(fuse, alignment, output_stride, levels):
    """Each step from what the one before it returned; the last stage of a stride is the one that is read."""
    options = dataclasses.replace(SMALL, fuse=fuse, alignment=alignment, output_stride=output_stride)
    network, _, x = tiny(options, shape=(2, 72, 40, 2))
    variables = varied(network, x)

    @jax.jit
    def run(variables, x):
        prediction, state = network.apply(variables, x, False, capture_intermediates=True)
        return prediction, network.apply(variables, x, False, method="encode"), state["intermediates"]

    prediction, features, inner = run(variables, x)
    strides = [4, 8, 16, 32][:levels]
    assert list(features) == list(prediction.pyramid) == strides

    def returned(name):
        return inner[name]["__call__"][0]

    @jax.jit
    def expected(variables, features):
        def block(name, kernel, y):
            return ConvNormReLU(8, kernel).apply(of(variables, name), y, False)

        maps = [PyramidPooling((1, 2, 3, 6), 8).apply(of(variables, "pooling"), features[strides[-1]], False)]
        for i in reversed(range(levels - 1)):
            lateral = block(f"laterals_{i}", 1, features[strides[i]])
            up = returned(f"align_{i}") if alignment == "flow" else resize_bilinear(maps[0], lateral.shape[1:3])
            maps.insert(0, lateral + up)
        distilled = outputs = maps
        if fuse:
            distilled = [
                Hallucination(8).apply(of(variables, f"hallucinate_{i}"), y, False) for i, y in enumerate(maps)
            ]
            outputs = [jnp.concatenate(pair, -1) for pair in zip(maps, distilled, strict=True)]
        outputs = [block(f"smooth_{i}", 3, y) for i, y in enumerate(outputs[:-1])] + outputs[-1:]
        joined = jnp.concatenate([resize_bilinear(y, (18, 10)) for y in outputs], -1)
        embedding = block("join", 3, joined)
        scores = conv(3, bias=True).apply(of(variables, "classifier"), embedding)
        return distilled, embedding, resize_bilinear(scores, (72, 40))

    distilled, embedding, logits = expected(variables, features)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for stride, y in zip(strides, distilled, strict=True):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(prediction.pyramid[stride], y, **close)
    np.testing.assert_allclose(prediction.embedding, embedding, **close)
    np.testing.assert_allclose(prediction.logits, logits, **close)
    assert ("align_0" in inner) == (alignment == "flow")
    assert f"smooth_{levels - 1}" not in inner


@pytest.mark.parametrize("size", [(12, 6), (7, 11), (1, 1)])
def test_pooling_is_the_definition(size):
    module, x = PyramidPooling((1, 3), 8), image(2, *size, 5)
    variables = varied(module, x)
    params = variables["params"]
    levels = []
    for i, side in enumerate((1, 3)):
        weights = params[f"level_{i}"]
        assert weights["kernel"].shape == (1, 1, 5, 2)
        level = np.asarray(adaptive_avg_pool(x, (side, side))) @ weights["kernel"][0, 0] + weights["bias"]
        levels.append(resize_bilinear(np.maximum(level, 0), size))
    expected = ConvNormReLU(8, 3).apply(of(variables, "project"), np.concatenate([*levels, x], -1), False)
    np.testing.assert_allclose(module.apply(variables, x, False), expected, rtol=1e-5, atol=1e-5)


def test_hallucination_is_the_definition():
    module, x = Hallucination(4), image(2, 6, 5, 3)
    variables = varied(module, x)
    y = ConvNormReLU(4, 3).apply(of(variables, "hidden"), x, False)
    expected = conv(4, 3, bias=True).apply(of(variables, "project"), y)
    np.testing.assert_allclose(module.apply(variables, x, False), expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(expected) < 0).any(), "no activation at the end"


@pytest.mark.parametrize("corner_aligned", [False, True])
def test_it_starts_as_a_plain_pyramid(corner_aligned):
    """With the same weights; not so after the offsets have moved, and neither is the one grid the other."""
    options = dataclasses.replace(SMALL, corner_aligned=corner_aligned)
    x = image(2, 72, 40, 1)
    network, variables = started(options, x)
    plain = build_network(dataclasses.replace(options, alignment="none"), 3)
    other = build_network(dataclasses.replace(SMALL, corner_aligned=not corner_aligned), 3)
    rest = {"params": {k: v for k, v in variables["params"].items() if not k.startswith("align")}}
    rest["batch_stats"] = variables["batch_stats"]
    apply = {n: jax.jit(lambda v, n=n: n.apply(v, x, False).logits) for n in (network, plain, other)}
    logits = apply[network](variables)
    np.testing.assert_allclose(logits, apply[plain](rest), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(rest) == jax.tree.structure(shapes_of(plain, x))
    assert np.abs(logits - apply[other](variables)).max() > 1e-2
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if any(key.key == "offsets" for key in path) else leaf, variables
    )
    assert np.abs(logits - apply[network](moved)).max() > 1e-2


@pytest.mark.parametrize("corner_aligned", [False, True])
def test_offsets_learn(corner_aligned):
    """From the first step on; what they are predicted from learns from the second one."""
    x = image(2, 64, 64, 2)
    network, variables = started(dataclasses.replace(SMALL, corner_aligned=corner_aligned), x)
    labels = jax.nn.one_hot(np.random.default_rng(1).integers(3, size=(2, 64, 64)), 3)

    @jax.jit
    def gradients(params):
        def loss(params):
            prediction, _ = network.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return -(jax.nn.log_softmax(prediction.logits) * labels).sum(-1).mean()

        return jax.grad(loss)(params)

    def largest(tree, name):
        return [float(jnp.abs(tree[f"align_{i}"][name]["kernel"]).max()) for i in range(3)]

    first = gradients(variables["params"])
    assert min(largest(first, "offsets")) > 1e-5
    assert largest(first, "high") == largest(first, "low") == [0, 0, 0]
    params = jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], first)
    assert min(largest(params, "offsets")) > 1e-6
    second = gradients(params)
    assert min(largest(second, "high") + largest(second, "low")) > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((first, second)))


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_classes_at_any_size(encoder, dtype):
    options = DHFA(encoder=encoder, width=0.25 if encoder == "resnet18" else 0.05, fuse=encoder == "resnet50")
    network = build_network(options, 8, dtype)
    x = image(2, 72, 40, 3)
    variables = varied(network, x)

    @jax.jit
    def run(variables, x):
        train, new = network.apply(variables, x, True, mutable=["batch_stats"])
        return network.apply(variables, x, False), train, new

    inference, train, new = run(variables, x)
    for prediction in (inference, train):
        assert (prediction.logits.shape, prediction.logits.dtype) == ((2, 72, 40, 8), jnp.float32)
        assert {y.dtype for y in jax.tree.leaves((prediction.pyramid, prediction.embedding))} == {jnp.dtype(dtype)}
        assert all(np.isfinite(y.astype(np.float32)).all() for y in jax.tree.leaves(prediction))
    assert (inference.logits != train.logits).any()
    for path, leaf in traverse_util.flatten_dict(new["batch_stats"]).items():
        assert (leaf != traverse_util.flatten_dict(variables["batch_stats"])[path]).any(), path


@pytest.mark.parametrize(("options", "expected"), [
    (DHFA(width=1 / 8), {"laterals_0": (1, 1, 8, 16), "laterals_2": (1, 1, 32, 16), "join": (3, 3, 64, 16),
                         "level_3": (1, 1, 64, 4), "project": (3, 3, 80, 16), "smooth_0": (3, 3, 16, 16),
                         "high": (1, 1, 16, 8), "low": (1, 1, 16, 8), "offsets": (3, 3, 16, 2)}),
    (DHFA(encoder="resnet50", width=1 / 8, channels=256, fuse=True, bins=(4,)),
     {"laterals_0": (1, 1, 32, 32), "laterals_2": (1, 1, 128, 32), "join": (3, 3, 160, 32),
      "level_0": (1, 1, 256, 8), "smooth_0": (3, 3, 64, 32), "offsets": (3, 3, 32, 2), "hidden": (3, 3, 32, 32)}),
    (DHFA(width=1 / 64, channels=64), {"level_0": (1, 1, 8, 1), "high": (1, 1, 1, 1), "offsets": (3, 3, 2, 2)}),
])  # fmt: skip
def test_channels(options, expected):
    network = build_network(options, 3)
    shapes = shapes_of(network, jnp.ones((1, 32, 32, 1)))["params"]
    kernels = {path[:-1]: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()
               if path[-1] == "kernel" and path[0] != "encoder"}  # fmt: skip
    for name, shape in expected.items():
        found = [kernel for path, kernel in kernels.items() if name in path]
        assert shape in found, name
    assert kernels[("classifier",)][2] == network.channels


def test_parameters():
    """Of seven classes and three channels at full width."""

    def parameters(options):
        network = build_network(options, 7)
        shapes = shapes_of(network, jnp.ones((1, 64, 64, 3)))["params"]
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    c, offsets = 128, 2 * 128 * 64 + 9 * 128 * 2
    trunk = 11_176_512
    laterals = (64 + 128 + 256) * c + 3 * 2 * c
    pooling = 4 * (512 * 32 + 32) + 9 * (512 + 128) * c + 2 * c
    head = 3 * (9 * c * c + 2 * c) + 9 * 4 * c * c + 2 * c + c * 7 + 7
    assert parameters(DHFA(alignment="none")) == trunk + laterals + pooling + head
    assert parameters(DHFA()) == trunk + laterals + pooling + head + 3 * offsets
    hallucination = 4 * (9 * c * c + 2 * c + 9 * c * c + c) + (3 + 1) * 9 * c * c
    assert parameters(DHFA(fuse=True)) == trunk + laterals + pooling + head + 3 * offsets + hallucination


@pytest.mark.parametrize("bins", [(), (1, 0)])
def test_bins_are_from_1(bins):
    with pytest.raises(UserError, match=r"bins are \[.*\], .* whole numbers from 1"):
        build_network(DHFA(bins=bins), 3)
