"""What every network keeps: shapes, statistics, gradients, dtypes, any size, and the same figures on many devices."""

import dataclasses
import functools
import math
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import export
from models.toy_variables import tiny

from sarjax.errors import UserError
from sarjax.models import NETWORKS, build_network
from sarjax.models.layers import kaiming_fan_in, kaiming_fan_out
from sarjax.models.resnet import channels_of
from sarjax.models.torchvision import encoders
from sarjax.options import DHFA, DLLR, FCN, Change, DeepLabV3, FCSiamDiff, LANet, NetworkOptions, PSPNet

SMALL = {"encoder": "resnet18", "width": 1 / 16}
TINY = {
    "fcn": FCN(width=1 / 8),
    "fcn_dilated": FCN(width=1 / 8, output_stride=8, channels=5),
    "fcn_cut": FCN(width=1 / 8, stages=2),
    "lanet": LANet(width=1 / 8),
    "lanet_public": LANet(width=1 / 8, residual=False, stages=4),
    "fcn_se": LANet(width=1 / 8, low_window=0, high_window=0),
    "deeplabv3": DeepLabV3(**SMALL),
    "deeplabv3_stride_8": DeepLabV3(encoder="resnet50", width=1 / 32, output_stride=8, rates=(2,), channels=64),
    "pspnet": PSPNet(**SMALL, auxiliary=True),
    "pspnet_stride_16": PSPNet(encoder="resnet50", width=1 / 32, output_stride=16, bins=(1, 4), upsampling=(64, 32)),
    "dhfa": DHFA(**SMALL),
    "dhfa_fuse": DHFA(encoder="resnet50", width=1 / 32, channels=256, fuse=True, alignment="none"),
    "dhfa_stride_16": DHFA(**SMALL, output_stride=16, corner_aligned=True, bins=(2,), fuse=True),
    "dllr": DLLR(**SMALL),
    "change": Change(**SMALL),
    "change_stride_8": Change(encoder="resnet50", width=1 / 32, channels=256, output_stride=8),
    "fc_siam_diff": FCSiamDiff(width=1 / 4),
}
GLOBAL = ("fcn_se", "deeplabv3", "pspnet", "dhfa", "dllr")
DATES = ("change", "fc_siam_diff")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", TINY)
def test_contract(name):
    network, variables, x = tiny(TINY[name])
    assert network.num_classes == 3
    assert set(variables) == {"params", "batch_stats"}
    places = encoders(variables["params"])
    expected = {"dllr": [("optical", "encoder"), ("sar", "encoder")], "fc_siam_diff": []}
    assert places == expected.get(name, [("encoder",)])
    for place in places:
        assert "conv1" in functools.reduce(operator.getitem, place, variables["params"]), "where pretrained weights go"

    @jax.jit
    def train(variables, x):
        prediction, new = network.apply(variables, x, True, mutable=["batch_stats"])
        return prediction, new, network.apply(variables, x, True, mutable=["batch_stats"], method="encode")[0]

    prediction, new, features = train(variables, x)
    assert prediction.logits.shape == (2, 65, 47, 3)
    assert np.isfinite(prediction.logits).all()
    assert (prediction.auxiliary is not None) == (name.startswith("lanet") or name in ("fcn_se", "pspnet"))
    if prediction.auxiliary is not None:
        assert prediction.auxiliary.shape == prediction.logits.shape
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    assert features.keys() == prediction.features.keys() == prediction.pyramid.keys()
    assert list(prediction.pyramid) == sorted(prediction.pyramid)
    for stride, feature in features.items():
        assert feature.shape[:3] == (2, -(-65 // stride), -(-47 // stride))
        np.testing.assert_allclose(feature, prediction.features[stride], rtol=1e-4, atol=1e-4)
        assert prediction.pyramid[stride].shape[:3] == feature.shape[:3]
        own = prediction.pyramid[stride].shape != feature.shape or (prediction.pyramid[stride] != feature).any()
        assert own == name.startswith(("dhfa", "change"))

    inference = jax.jit(lambda v, x: network.apply(v, x, False).logits)
    # In inference an image does not see its batch.
    other = np.stack([x[0], x[0] * 3 + 1])
    np.testing.assert_allclose(inference(variables, x)[0], inference(variables, other)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_the_classifier_of_the_embedding(name):
    """Bit for bit; and of whatever else is put there, at any size."""
    network, variables, x = tiny(TINY[name])
    prediction = jax.jit(lambda v, x: network.apply(v, x, False))(variables, x)
    b, h, w, c = prediction.embedding.shape
    assert (b, h <= 65, w <= 47, prediction.embedding.dtype) == (2, True, True, jnp.float32)
    assert (np.abs(prediction.embedding).max((0, 1, 2)) > 0).any()
    assert network.classifies == (not isinstance(TINY[name], LANet)) == hasattr(network, "classify")
    if not network.classifies:
        low, high = variables["params"]["low_classifier"]["kernel"], variables["params"]["high_classifier"]["kernel"]
        assert c == low.shape[2] + high.shape[2]
        return
    classify = jax.jit(lambda v, y, size: network.apply(v, y, size, method="classify"), static_argnums=2)
    np.testing.assert_array_equal(classify(variables, prediction.embedding, (65, 47)), prediction.logits)
    if name == "fc_siam_diff":  # its classifier looks around
        return
    flat = classify(variables, np.ones((1, 2, 3, c), np.float32), (9, 7))
    constant = variables["params"]["classifier"]["kernel"].sum((0, 1, 2)) + variables["params"]["classifier"]["bias"]
    np.testing.assert_allclose(flat, np.broadcast_to(constant, (1, 9, 7, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*GLOBAL, *DATES])
def test_training_is_finite_and_the_same_on_eight_devices(name):
    """Loss, gradients and running statistics of a batch that lies on eight devices, against one device."""
    network, variables, x = tiny(TINY[name], shape=(8, 32, 48, 2))

    def objective(params, stats, x):
        prediction, new = network.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        outputs = [y for y in (prediction.logits, prediction.auxiliary) if y is not None]
        return sum(jnp.square(y - 1).mean() for y in outputs), new["batch_stats"]

    def run(variables, x):
        (loss, stats), gradients = step(variables["params"], variables["batch_stats"], x)
        return loss, traverse_util.flatten_dict(stats), traverse_util.flatten_dict(gradients)

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    one = run(variables, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    many = run(jax.device_put(variables, whole), jax.device_put(x, rows))
    assert len(one[0].devices()) == 1
    assert len(many[0].devices()) == 8
    np.testing.assert_allclose(one[0], many[0], rtol=1e-5)
    for path, stats in one[1].items():
        np.testing.assert_allclose(stats, many[1][path], rtol=1e-4, atol=1e-5, err_msg=str(path))
        start = traverse_util.flatten_dict(variables["batch_stats"])[path]
        assert (np.asarray(stats) != start).any(), path
    largest = max(float(jnp.abs(g).max()) for g in one[2].values())
    for path, gradient in one[2].items():
        assert np.isfinite(gradient).all(), path
        np.testing.assert_allclose(gradient, many[2][path], rtol=1e-3, atol=1e-4 * largest, err_msg=str(path))
        # What a batch-norm removes again: a bias in front of it.
        unread = name == "dllr" and path[0] in ("optical", "sar") and path[1] == "classifier"  # heads of their own
        if path[-1] == "kernel" and not unread:
            assert float(jnp.abs(gradient).max()) > 1e-6 * largest, path


@pytest.mark.parametrize("name", [*GLOBAL, *DATES])
def test_one_program_for_all_sizes(name):
    network, variables, _ = tiny(TINY[name])
    a = network.context.alignment
    b, h, w = export.symbolic_shape(f"b, {a}*h, {a}*w", constraints=("h <= 1024", "w <= 1024"))
    apply = jax.jit(lambda x: network.apply(variables, x, False).logits)
    program = export.export(apply)(jax.ShapeDtypeStruct((b, h, w, 2), jnp.float32))
    x = np.random.default_rng(2).normal(size=(2, 3 * a, 2 * a, 2)).astype(np.float32)
    np.testing.assert_allclose(program.call(x), apply(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GLOBAL)
def test_global_networks_look_everywhere(name):
    """The last column answers to the first, which is out of reach of the convolutions."""
    network, variables, _ = tiny(TINY[name])
    alignment, radius = network.context
    encoder = network.sar.encoder if name == "dllr" else network.encoder
    assert (alignment, radius) == (max(encoder.strides.values()), None)
    x = np.random.default_rng(3).normal(size=(2, alignment, 1280, 2)).astype(np.float32)
    x[1] = x[0]
    x[1, :, 0] += 100
    plain, changed = jax.jit(lambda x: network.apply(variables, x, False).logits)(x)
    assert float(jnp.abs(plain - changed)[:, -1].max()) > 1e-4


@pytest.mark.parametrize("options", [DeepLabV3(**SMALL), PSPNet(**SMALL), LANet(**SMALL, low_window=0), DHFA(**SMALL)])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_strides(options, output_stride):
    options = dataclasses.replace(options, output_stride=output_stride)
    network = build_network(options, 5)
    x = jax.ShapeDtypeStruct((1, 65, 96, 1), jnp.float32)
    prediction = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x, False)[0], x)
    assert prediction.logits.shape == (1, 65, 96, 5)
    last = min(getattr(options, "stages", 4), 4)
    stride = min(output_stride, 2 ** (last + 1))
    assert max(prediction.features) == stride
    assert prediction.features[stride].shape == (
        1,
        -(-65 // stride),
        96 // stride,
        channels_of("resnet18", 1 / 16, last),
    )
    # Either window of 0 is enough; the other one's patches are still aligned to.
    assert network.context == (math.lcm(stride, stride * getattr(options, "high_window", 1)), None)


@pytest.mark.parametrize("name", NETWORKS)
def test_initialisers(name):
    """Encoders start as torchvision's; heads by their fan-in, lest few classes make large logits."""
    seen = {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv):
            seen.setdefault("encoder" in context.module.path, set()).add(context.module.kernel_init)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        tiny(TINY[name])
    # DHFA-Net's offsets start at 0.
    heads = {kaiming_fan_in, nn.initializers.zeros} if name == "dhfa" else {kaiming_fan_in}
    assert (
        seen == {True: {kaiming_fan_out}, False: heads}
        if name != "fc_siam_diff"
        else {False: {*heads, kaiming_fan_out}}
    )


def equations(program):
    """Of a program and of those that it calls."""
    for equation in program.eqns:
        yield equation
        for called in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(called, "jaxpr"):
                yield from equations(called.jaxpr)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16(name):
    network, variables, x = tiny(TINY[name], "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    program = jax.make_jaxpr(lambda v, x: network.apply(v, x, False))(variables, x)
    convolutions = [e for e in equations(program.jaxpr) if e.primitive.name == "conv_general_dilated"]
    full = [e.outvars[0].aval for e in convolutions if e.outvars[0].aval.dtype != jnp.bfloat16]
    # DHFA-Net's offsets, x and y, are float32.
    assert [(y.dtype, y.shape[-1]) for y in full] == 3 * (name == "dhfa") * [(jnp.float32, 2)]
    prediction = jax.jit(lambda v, x: network.apply(v, x, False))(variables, x)
    assert prediction.logits.dtype == jnp.float32
    exact = jax.jit(lambda v, x: build_network(TINY[name], 3).apply(v, x, False).logits)(variables, x)
    np.testing.assert_allclose(prediction.logits, exact, atol=0.1 * float(jnp.abs(exact).max()))


def test_dilated_stages_share_a_stride_and_the_last_counts():
    network, variables, x = tiny(TINY["fcn_dilated"], shape=(1, 32, 32, 2))
    features = jax.eval_shape(lambda v, x: network.apply(v, x, False, method="encode"), variables, x)
    assert {stride: f.shape[-1] for stride, f in features.items()} == {4: 8, 8: 64}


def test_every_options_class_has_a_network():
    ours = {n for n, options in NetworkOptions.registry().items() if options.__module__.startswith("sarjax.")}
    assert set(NETWORKS) == ours
    with pytest.raises(UserError, match="unknown network"):
        build_network(NetworkOptions(), 3)
