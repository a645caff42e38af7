"""Pretrained encoders: weights in torchvision's layout into a network's variables."""

import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from sarjax.errors import UserError
from sarjax.models.resnet import ENCODERS, ResNet
from sarjax.options import NetworkOptions

Tree = Any

# What a linen leaf is called in PyTorch; a batch-norm's bias keeps its name.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_CLASSIFIER = frozenset({"fc.weight", "fc.bias"})
_FIRST = "conv1.weight"


class Entry(NamedTuple):
    """Where a torchvision key belongs: collection and path inside the encoder's variables; shape in PyTorch's order."""

    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]


def layout(encoder: str, *, width: float = 1.0, in_channels: int = 3, stages: int = 4) -> dict[str, Entry]:
    """{torchvision key: Entry} of a ResNet's convolutional part: all keys but fc.* and *.num_batches_tracked."""
    network = ResNet(encoder, width, stages=stages)
    image = jax.ShapeDtypeStruct((1, 64, 64, in_channels), jnp.float32)
    return _entries(jax.eval_shape(lambda x: network.init(jax.random.key(0), x, False), image))


def load_encoder(variables: Mapping[str, Tree], path: str | Path, options: NetworkOptions) -> dict[str, Tree]:
    """`variables` of a network whose subtrees "encoder" (one per sensor where it has several) hold the weights of a
    torchvision-layout file.

    variables: {"params", "batch_stats", ...} as `init` made them; not modified. path: `.safetensors`, or `.pth` where
    PyTorch is installed. options: those that the network was built from.

    Convolutions go from OIHW to HWIO. A first convolution for another number of channels than the network's is
    averaged over its c channels, repeated, and scaled by c / in_channels, which keeps the response to an image
    whose channels are equal. The file may hold `fc.*`, `*.num_batches_tracked` and the stages that the network
    is cut before; those are not used.

    Raises UserError, naming the file, for anything missing, unexpected or of another shape.
    """
    found = read_state(path)
    for place in encoders(variables["params"]):
        variables = _loaded(variables, place, found, path, options)
    return dict(variables)


def encoders(params: Tree) -> list[tuple[str, ...]]:
    """Paths of the subtrees of parameters that are a ResNet's."""
    paths = {
        path[: path.index("encoder") + 1] for path in traverse_util.flatten_dict(dict(params)) if "encoder" in path
    }
    return sorted(paths)


def _loaded(
    variables: Mapping[str, Tree],
    place: tuple[str, ...],
    found: Mapping[str, np.ndarray],
    path: str | Path,
    options: NetworkOptions,
) -> dict[str, Tree]:
    """`variables` whose subtree at `place` holds `found`, what was read from `path`."""
    inside = {name: functools.reduce(operator.getitem, place, variables[name]) for name in ("params", "batch_stats")}
    wanted = _entries(inside)
    unused = set(layout(options.encoder)) | _CLASSIFIER
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in unused and not key.endswith(".num_batches_tracked")]
    if missing or unexpected:
        parts = [f"{kind} {_some(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise UserError(f"{path} does not fit {options.encoder}{_recognised(found)}: {'; '.join(parts)}.")

    result = {name: traverse_util.flatten_dict(dict(tree)) for name, tree in variables.items()}
    for key, entry in wanted.items():
        array = np.asarray(found[key], np.float32)
        if key == _FIRST and array.ndim == 4 and array.shape[1] != entry.shape[1]:
            array = _inflate(array, entry.shape[1])
        if array.shape != entry.shape:
            raise UserError(
                f"{path}: {key} has shape {array.shape}, but {options.encoder} of width {options.width:g} needs "
                f"{entry.shape}."
            )
        leaf = (*place, *entry.path)
        value = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        old = result[entry.collection][leaf]
        result[entry.collection][leaf] = jax.device_put(value, old.sharding) if isinstance(old, jax.Array) else value
    return {name: traverse_util.unflatten_dict(flat) for name, flat in result.items()}


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """{key: array} of a weight file; UserError for one that is absent, unreadable or of another kind."""
    path = Path(path)
    accepted = "accepted is a .safetensors file with torchvision's key names"
    if not path.is_file():
        raise UserError(f"there is no weight file {path}; {accepted}.")
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a readable .safetensors file ({error}); {accepted}.") from None
    if path.suffix not in (".pth", ".pt"):
        raise UserError(f"{path} is not a weight file of a known kind; {accepted}, or .pth where PyTorch is installed.")
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read, which is not installed; {accepted}.") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: value.float().numpy() for key, value in state.items()}
    # A file of another kind fails in torch's reader or unpickler, one with other contents in the line after.
    except Exception as error:
        raise UserError(f"{path} holds no plain dictionary of tensors ({type(error).__name__}); {accepted}.") from None


def _entries(variables: Mapping[str, Tree]) -> dict[str, Entry]:
    entries = {}
    for collection, tree in variables.items():
        for path, leaf in traverse_util.flatten_dict(dict(tree)).items():
            *modules, name = path
            key = ".".join([*(module.replace("_", ".") for module in modules), _LEAVES[name]])
            shape = tuple(leaf.shape)
            entries[key] = Entry(collection, path, (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape)
    return entries


def _inflate(kernel: np.ndarray, channels: int) -> np.ndarray:
    """An OIHW kernel for `channels` inputs whose sum over inputs is that of `kernel`."""
    return np.repeat(kernel.sum(1, keepdims=True) / channels, channels, axis=1)


def _some(keys: list[str], limit: int = 6) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _recognised(found: Mapping[str, Any]) -> str:
    """ " (it holds a resnet34)", where the keys are those of a known encoder."""
    keys = {key for key in found if key not in _CLASSIFIER and not key.endswith(".num_batches_tracked")}
    return next((f" (it holds a {name})" for name in ENCODERS if keys == set(layout(name))), "")
