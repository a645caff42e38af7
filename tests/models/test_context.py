"""How far each network looks, against what a change of one column of its input really changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from models.toy_variables import random_variables

from sarjax.config import Experiment, Inputs
from sarjax.methods import build_method
from sarjax.methods.record import Context, Schedule
from sarjax.models import build_network
from sarjax.models.context import Extent, FieldOfView
from sarjax.options import FCN, Change, FCSiamDiff, LANet, Supervised

SMALL = {"width": 1 / 16}
NETWORKS = {
    "fcn": (FCN(**SMALL), (32, 296)),
    "fcn_one_stage": (FCN(**SMALL, stages=1), (4, 30)),
    "fcn_three_stages": (FCN(width=0.25, stages=3), (16, 144)),
    "fcn_stride_8": (FCN(**SMALL, output_stride=8), (8, 212)),
    "fcn_stride_16": (FCN(**SMALL, output_stride=16), (16, 240)),
    "fcn_resnet50": (FCN(**SMALL, encoder="resnet50", output_stride=16), (16, 252)),
    "lanet": (LANet(**SMALL), (32, 210)),
    "lanet_four_stages": (LANet(**SMALL, stages=4), (64, 426)),
    "lanet_stride_8": (LANet(**SMALL, output_stride=8, residual=False), (32, 150)),
    "lanet_odd_patches": (LANet(**SMALL, low_window=3, high_window=3), (48, 226)),
    "change": (Change(**SMALL), (32, 326)),
    "change_stride_8": (Change(**SMALL, output_stride=8), (8, 222)),
    "fc_siam_diff": (FCSiamDiff(**SMALL), (16, 114)),
}


def positive(variables):
    """Weights under which nothing cancels and no ReLU is shut: every path from input to output shows."""

    def one(path, leaf):
        if path[-1].key != "kernel":
            return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), jnp.float32)
        return jnp.full(leaf.shape, 1 / np.prod(leaf.shape[:-1]), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, variables)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_radius_is_what_a_change_reaches(name):
    """Columns at every place in the grid are changed one at a time: the furthest change is exactly at the radius."""
    options, expected = NETWORKS[name]
    network = build_network(options, 2)
    assert network.context == expected
    alignment, radius = network.context
    side = (2 * (radius // alignment) + 7) * alignment
    first = (radius // alignment + 3) * alignment  # two periods and more are left on either side
    columns = first + np.arange(alignment)
    image = np.full((1, alignment, side, options.DATES), 0.01, np.float32)  # features are about 1: no sigmoid saturates
    variables = positive(random_variables(network, image))
    apply = jax.jit(lambda x: network.apply(variables, x, train=False).logits)
    parts = np.array_split(columns, max(1, alignment // 16))
    plain, reached = np.asarray(apply(np.repeat(image, len(parts[0]), 0))), []
    for part in parts:
        images = np.repeat(image, len(part), 0)
        images[np.arange(len(part)), :, part] = 1e12 * np.arange(1, options.DATES + 1)  # no difference is 0
        changed = (np.asarray(apply(images)) != plain).any((1, 3))
        reached += [np.abs(np.flatnonzero(row) - q).max() for row, q in zip(changed, part, strict=True)]
    assert np.isfinite(plain).all()
    assert max(reached) <= radius, "a change outside of the radius shows"
    assert max(reached) == radius, "the radius is larger than need be"


def test_rows_are_like_columns():
    network = build_network(LANet(**SMALL), 2)
    alignment, radius = network.context
    x = np.random.default_rng(0).normal(size=(1, 640, 32, 1)).astype(np.float32)
    variables = random_variables(network, x)
    apply = jax.jit(lambda x: network.apply(variables, x, train=False).logits)
    far, near = x.copy(), x.copy()
    p = 320
    far[:, : p - radius] = 9
    far[:, p + radius + 1 :] = -9
    near[:, p + 60] = 9
    plain, far, near = (np.asarray(apply(y))[0, p] for y in (x, far, near))
    np.testing.assert_array_equal(far, plain)
    assert (near != plain).any()
    assert alignment == 32


def test_extents_by_hand():
    assert Extent().convolution(7, 2) == (2, 3, 3)
    assert Extent().convolution(7, 2).convolution(3, 2) == (4, 5, 5)
    assert Extent(4, 5, 5).convolution(3, dilation=2) == (4, 13, 13)
    assert Extent().patches(4) == (4, 0, 3)
    # Pixels 2 to 5 lie between the centres 1.5 and 5.5 of patches 0 and 1, which read pixels 0 to 7.
    assert Extent().patches(4).upsampled(1) == (1, 5, 5)
    # Pixel 1 is the centre of patch 0 of three; pixel 2 reads patches 0 and 1, pixel 3 too.
    assert Extent().patches(3).upsampled(1) == (1, 3, 3)
    assert Extent(8, 2, 3).upsampled(8) == (8, 2, 3)
    assert Extent(1, 7, 9).field_of_view(4, 6) == FieldOfView(12, 9)
    assert FieldOfView(32, 10).grown(3) == (32, 13)
    assert FieldOfView(32, None).grown(3) == (32, None)


@pytest.mark.parametrize("side", [0, 1, 10, 11])
def test_a_head_looks_further_where_its_inputs_do(side):
    """By half of the box of the local means: a pixel's share in them reaches so far."""
    experiment = Experiment(network=FCN(**SMALL, stages=1), inputs=Inputs(local_mean=side), method=Supervised())
    method = build_method(Context(experiment, toy.SPEC, toy.dataset(8).statistics, Schedule(1, 1, 1)))
    assert method.heads["main"].context == (4, 30 + side // 2)
