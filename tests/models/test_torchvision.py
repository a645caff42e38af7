"""Import of torchvision weights: exact keys and shapes, inflation, cuts, and what every mistake says."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models.toy_variables import random_variables

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.models.resnet import ENCODERS, ResNet
from sarjax.models.torchvision import layout, load_encoder
from sarjax.options import FCN, LANet

OPTIONS = LANet(width=1 / 8)
ABSENT = object()


def random_state(encoder="resnet18", width=1 / 8, in_channels=3):
    """A complete state dictionary as torchvision saves it, with random numbers."""
    rng = np.random.default_rng(0)
    entries = layout(encoder, width=width, in_channels=in_channels)
    state = {key: rng.uniform(0.5, 1, entry.shape).astype(np.float32) for key, entry in entries.items()}
    norms = [key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")]
    state |= {f"{key}.num_batches_tracked": np.array(7) for key in norms}
    return state | {"fc.weight": np.ones((5, 8), np.float32), "fc.bias": np.ones(5, np.float32)}


def write(folder, state, name="weights.safetensors"):
    safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, folder / name)
    return folder / name


def variables_of(options, in_channels=3):
    return random_variables(build_network(options, 4), np.ones((1, 32, 32, in_channels), np.float32))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_keys_and_shapes_are_torchvisions(oracle, encoder):
    _, description = oracle("resnet_keys")
    expected = {key: tuple(shape) for key, shape in description["layout"][encoder].items()}
    tracked = {key for key in expected if key.endswith(".num_batches_tracked")}
    ours = {key: entry.shape for key, entry in layout(encoder).items()}
    assert ours == {key: shape for key, shape in expected.items() if key not in tracked and not key.startswith("fc.")}
    assert tracked == {k.replace("running_mean", "num_batches_tracked") for k in ours if k.endswith("running_mean")}
    trained = sum(np.prod(e.shape, dtype=int) for e in layout(encoder).values() if e.collection == "params")
    fc = sum(np.prod(expected[key], dtype=int) for key in ("fc.weight", "fc.bias"))
    assert trained + fc == description["parameters"][encoder]


@pytest.mark.parametrize(("encoder", "parameters"), [
    ("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032), ("resnet101", 42_500_160),
])  # fmt: skip
def test_parameter_counts(encoder, parameters):
    assert sum(np.prod(e.shape, dtype=int) for e in layout(encoder).values() if e.collection == "params") == parameters


def test_loads_every_leaf_of_the_encoder_and_no_other(tmp_path):
    state = random_state()
    variables = variables_of(OPTIONS)
    before = jax.tree.map(np.array, variables)
    loaded = load_encoder(variables, write(tmp_path, state), OPTIONS)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    for collection in ("params", "batch_stats"):
        for name, tree in loaded[collection].items():
            if name != "encoder":
                jax.tree.map(np.testing.assert_array_equal, tree, variables[collection][name])
    for key, entry in layout("resnet18", width=1 / 8, stages=3).items():
        leaf = loaded[entry.collection]["encoder"]
        for name in entry.path:
            leaf = leaf[name]
        expected = state[key].transpose(2, 3, 1, 0) if state[key].ndim == 4 else state[key]
        np.testing.assert_array_equal(leaf, expected, err_msg=key)
        assert leaf.dtype == jnp.float32


def test_loaded_leaves_stay_where_they_were(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    variables = jax.device_put(variables_of(OPTIONS), everywhere)
    loaded = load_encoder(variables, write(tmp_path, random_state()), OPTIONS)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {everywhere}


def test_the_classifier_may_be_left_out_and_half_precision_is_read(tmp_path):
    state = {key: value for key, value in random_state().items() if not key.startswith("fc.")}
    state = {key: value.astype(np.float16) for key, value in state.items() if "tracked" not in key}
    variables = variables_of(FCN(width=1 / 8))
    loaded = load_encoder(variables, write(tmp_path, state), FCN(width=1 / 8))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_inflation_keeps_the_response_to_equal_channels(tmp_path, channels):
    """An image whose channels are equal gives the same stem, whatever their number."""
    path = write(tmp_path, random_state())
    three = variables_of(OPTIONS, 3)
    other = variables_of(OPTIONS, channels)
    image = np.random.default_rng(1).normal(size=(1, 32, 32, 1)).astype(np.float32)

    def stem(variables, n):
        loaded = load_encoder(variables, path, OPTIONS)
        encoder = {name: loaded[name]["encoder"] for name in variables}
        network = ResNet(width=1 / 8, stages=3)
        return jax.jit(lambda v, x: network.apply(v, x, False)["stem"])(encoder, np.repeat(image, n, -1))

    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(stem(other, channels), stem(three, 3), rtol=1e-4, atol=1e-4)
    kernel = load_encoder(other, path, OPTIONS)["params"]["encoder"]["conv1"]["kernel"]
    mean = random_state()["conv1.weight"].mean(1).transpose(1, 2, 0)
    np.testing.assert_allclose(kernel, np.broadcast_to(mean[:, :, None] * 3 / channels, kernel.shape), rtol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"layer2.0.conv1.weight": ABSENT}, r"missing layer2\.0\.conv1\.weight\.$"),
    ({"bn1.running_var": ABSENT}, r"missing bn1\.running_var"),
    ({"extra.weight": np.ones(2)}, r"unexpected extra\.weight"),
    ({"layer4.7.conv1.weight": np.ones(2)}, r"unexpected layer4\.7"),
    ({"layer1.0.conv1.weight": np.ones((8, 8, 1, 1))}, r"layer1\.0\.conv1\.weight has .*8, 1, 1\).* \(8, 8, 3, 3\)"),
    ({"conv1.weight": np.ones((8, 3, 3, 3))}, r"conv1\.weight has shape"),
    ({"bn1.weight": np.ones(9)}, r"bn1\.weight has shape \(9,\)"),
])  # fmt: skip
def test_strict(tmp_path, change, message):
    state = {key: value for key, value in (random_state() | change).items() if value is not ABSENT}
    path = write(tmp_path, state)
    variables = variables_of(OPTIONS)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(variables, path, OPTIONS)
    assert str(path) in str(caught.value)


def test_another_width_or_encoder(tmp_path):
    variables = variables_of(OPTIONS)
    wide = write(tmp_path, random_state(width=1 / 4), "wide.safetensors")
    with pytest.raises(UserError, match=r"wide\.safetensors: .* resnet18 of width 0\.125 needs"):
        load_encoder(variables, wide, OPTIONS)
    deep = write(tmp_path, random_state("resnet34"), "deep.safetensors")
    with pytest.raises(UserError, match=r"does not fit resnet18 \(it holds a resnet34\): unexpected .* and \d+ more"):
        load_encoder(variables, deep, OPTIONS)
    bottlenecks = write(tmp_path, random_state("resnet50"), "bottlenecks.safetensors")
    with pytest.raises(UserError, match=r"\(it holds a resnet50\)"):
        load_encoder(variables, bottlenecks, OPTIONS)


def test_files_that_are_no_weights(tmp_path):
    variables = variables_of(OPTIONS)
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "weights.h5").write_text("")
    for name in ("absent.safetensors", "text.safetensors", "weights.h5"):
        with pytest.raises(UserError, match=rf"{name}.*accepted is a \.safetensors"):
            load_encoder(variables, tmp_path / name, OPTIONS)


def test_pth_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights\.pth needs PyTorch.*\.safetensors"):
        load_encoder(variables_of(OPTIONS), tmp_path / "weights.pth", OPTIONS)


class Tensor:
    """As much of a torch tensor as is used."""

    def __init__(self, array):
        self.array = array

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


def test_pth_is_read_as_weights_only(tmp_path, monkeypatch):
    def load(path, *, map_location, weights_only):
        assert weights_only
        assert map_location == "cpu"
        return contents

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    (tmp_path / "weights.pth").write_bytes(b"")
    variables = variables_of(OPTIONS)
    contents = {key: Tensor(array) for key, array in random_state().items()}
    loaded = load_encoder(variables, tmp_path / "weights.pth", OPTIONS)
    np.testing.assert_array_equal(loaded["params"]["encoder"]["bn1"]["scale"], random_state()["bn1.weight"])
    contents = {"state_dict": {}}
    with pytest.raises(UserError, match=r"weights\.pth holds no plain dictionary of tensors"):
        load_encoder(variables, tmp_path / "weights.pth", OPTIONS)
