"""Variables without a compiled `init`: PyTorch's arrays in the layout of flax, and random ones."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from sarjax.models import build_network

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_CONV = {"kernel": "weight", "bias": "bias"}


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def from_torch(array):
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def fill(arrays: Mapping[tuple[str, ...], np.ndarray]):
    """Variables of {(collection, *path): PyTorch's array}."""
    return traverse_util.unflatten_dict({path: from_torch(array) for path, array in arrays.items()})


def conv_paths(path: str, key: str, bias: bool = True) -> dict[tuple[str, ...], str]:
    """{(collection, *path): PyTorch's key} of the convolution at `path` ("a/b")."""
    leaves = ("kernel", "bias") if bias else ("kernel",)
    return {("params", *path.split("/"), leaf): f"{key}.{_CONV[leaf]}" for leaf in leaves}


def norm_paths(path: str, key: str) -> dict[tuple[str, ...], str]:
    """The same of a batch-norm."""
    return {
        ("params" if leaf in ("scale", "bias") else "batch_stats", *path.split("/"), leaf): f"{key}.{name}"
        for leaf, name in _NORM.items()
    }


def attention_paths(path: str, key: str, first: int) -> dict[tuple[str, ...], str]:
    """The same of an `Attention`; PyTorch's is a sequence whose down-projection is number `first`."""
    return (
        conv_paths(f"{path}/down", f"{key}.{first}")
        | norm_paths(f"{path}/bn", f"{key}.{first + 1}")
        | conv_paths(f"{path}/up", f"{key}.{first + 3}")
    )


def random_variables(network, *inputs):
    """What `network.init` could have made, drawn by numpy: compiling an initialisation takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    shapes = jax.eval_shape(lambda *x: network.init(jax.random.key(0), *x, False), *inputs)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def varied(network, x):
    """`random_variables` whose norms and biases are none of 0 and 1, so that each of them shows."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return leaf
        low, high = (-0.5, 0.5) if path[-1].key in ("bias", "mean") else (0.5, 1.5)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, random_variables(network, x))


def tiny(options, dtype="float32", shape=(2, 65, 47, 2)):
    """(network of three classes, its variables, an image)."""
    network = build_network(options, 3, dtype)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return network, random_variables(network, x), x
