"""A peer is the same function as our network: or a benchmark would compare two different things."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarjax.errors import UserError
from sarjax.models import build_network
from sarjax.options import DHFA, DLLR, FCN, DeepLabV3, LANet

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[bench]'")

from sarjax.bench import peers  # noqa: E402

CLASSES = 3
NETWORKS = {
    "lanet": LANet(width=0.125),
    "lanet, whole image": LANet(width=0.125, low_window=0, high_window=0, stages=4, residual=False),
    "deeplabv3": DeepLabV3(width=0.0625, encoder="resnet50"),
    "dhfa": DHFA(width=0.125),
    "dhfa, output stride 16": DHFA(width=0.125, output_stride=16, alignment="none"),
    "dllr": DLLR(width=0.125),
}


def both(options, channels=3, seed=0):
    """(our network, its variables with noise in all of them, the peer with the same)."""
    network = build_network(options, CLASSES)
    if isinstance(options, DLLR):
        network = network.clone(groups=((0, 1), (2,)))
    how = {"method": "views"} if isinstance(options, DLLR) else {}
    made = network.init(jax.random.key(seed), jnp.zeros((1, 64, 64, channels)), False, **how)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: x + 0.1 * np.abs(rng.standard_normal(x.shape)).astype(np.float32), made)
    peer = peers.peer(options, channels, CLASSES, network.groups if isinstance(options, DLLR) else ())
    peers.load(peer, noisy["params"], noisy["batch_stats"])
    return network, noisy, peer


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("train", [True, False])
def test_peer_is_the_same_function(name, train):
    network, variables, peer = both(NETWORKS[name])
    image = np.random.default_rng(1).standard_normal((2, 64, 96, 3)).astype(np.float32)
    if train:
        ours, moved = network.apply(variables, image, True, mutable=["batch_stats"])
    else:
        ours = network.apply(variables, image, False)
    peer = peer.double().train(train)
    theirs = peer(torch.from_numpy(image.transpose(0, 3, 1, 2)).double()).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(ours.logits, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())
    if train:
        again = both(NETWORKS[name])[2]
        peers.load(again, variables["params"], jax.device_get(moved["batch_stats"]))
        for key, value in again.state_dict().items():
            if "running" in key:
                np.testing.assert_allclose(peer.state_dict()[key], value, rtol=1e-3, atol=1e-4, err_msg=key)


def test_a_peer_that_has_more_than_ours_is_refused():
    _, variables, _ = both(DHFA(width=0.125, alignment="none"))
    aligned = peers.peer(DHFA(width=0.125), 3, CLASSES)
    with pytest.raises(ValueError, match="align_0"):
        peers.load(aligned, variables["params"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("options", "says"), [(FCN(), "'fcn'.*lanet"), (DHFA(fuse=True), "fuse"), (DHFA(corner_aligned=True), "corner")]
)
def test_what_has_no_peer_is_named(options, says):
    with pytest.raises(UserError, match=says):
        peers.peer(dataclasses.replace(options, width=0.125), 3, CLASSES)
