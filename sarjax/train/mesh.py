"""Devices as a mesh with axes `data`, `fsdp`, `space`, and where arrays live on it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sarjax import config
from sarjax.errors import UserError

AXES = ("data", "fsdp", "space")
SMALL = 2**16

# Ordered: the first pattern that matches a leaf's path decides.
RULES: tuple[tuple[str, str], ...] = ((r"^(step|skipped|bad_in_a_row)$", "replicate"), (r".*", "fsdp"))


def axis_sizes(shape: config.Mesh, devices: int, fewer: bool = False) -> dict[str, int]:
    """{axis: devices} of a mesh over so many; one axis may be -1 and takes what the others leave.

    fewer: sizes that are all given may use only some of the devices.
    """
    sizes = {axis: getattr(shape, axis) for axis in AXES}
    given = [s for s in sizes.values() if s != -1]
    product = int(np.prod(given))
    if min(given, default=1) < 1 or len(given) < len(AXES) - 1 or product > devices:
        fits = False
    elif len(given) == len(AXES):
        fits = product == devices or fewer
    else:
        fits = devices % product == 0
    if not fits:
        raise UserError(
            f"execution.mesh is data={shape.data} fsdp={shape.fsdp} space={shape.space}, which {devices} devices "
            f"do not make up; sizes whose product is {devices}, or one of them -1, are accepted."
        )
    return {axis: devices // product if s == -1 else s for axis, s in sizes.items()}


def make_mesh(shape: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Sizes that are all given may use fewer devices than a single process has: the first ones.
    Axes are of type Auto: sharding is inferred by the compiler from where inputs live.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = list(axis_sizes(shape, len(devices), fewer=jax.process_count() == 1).values())
    used = devices[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used)


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int) -> NamedSharding:
    """Rows over data and fsdp, height over space.

    Rows over `data` alone would make the compiler shard activations, not kernels, over fsdp.
    Height is axis 2 of (b,t,h,w,c) and (b,t,h,w), axis 1 of (b,h,w); a vector has none.
    """
    height = {5: 2, 4: 2, 3: 1}.get(ndim)
    spec: list[Any] = [None] * ndim
    spec[0] = ("data", "fsdp")
    if height is not None:
        spec[height] = "space"
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Numpy rows of this process -> global arrays on the mesh, for a plain batch or {stream: batch}."""
    if jax.process_count() == 1:  # the same arrays in one call, in less than half the time
        return jax.device_put(batch, jax.tree.map(lambda x: batch_sharding(mesh, np.ndim(x)), batch))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh, np.ndim(x)), np.asarray(x)), batch
    )


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, or a global one, as a global array of that sharding."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def abstract_batch(mesh: jax.sharding.Mesh, batch: Any, processes: int = 1) -> Any:
    """Shapes and shardings of the global batch whose local rows are `batch`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] * processes, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh, np.ndim(x))
        ),
        batch,
    )


def infer_sharding(mesh: jax.sharding.Mesh, tree: Any, rules: Sequence[tuple[str, str]] = RULES) -> Any:
    """A sharding per leaf of an abstract tree.

    rules: ordered (pattern of the path, rule). Rule "replicate" keeps a copy everywhere; "fsdp" cuts the largest axis
    that the mesh's fsdp divides, unless the leaf has fewer than 2^16 elements.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next(rule for pattern, rule in rules if re.search(pattern, name))
        size = mesh.shape["fsdp"]
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if rule == "replicate" or size == 1 or leaf.size < SMALL or not axes:
            return replicated(mesh)
        spec: list[Any] = [None] * leaf.ndim
        spec[max(axes, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def gathered(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Inside jit: every leaf whole on every device.

    Left to itself the compiler gathers a kernel twice, forwards and backwards, and where kernels are larger than
    activations, in deep stages and on small tiles, it sends the activations instead. Said explicitly, each sharded leaf
    is gathered once a step, and activations stay where their rows are.
    """
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "params/encoder/conv1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> Mapping[str, Any]:
    """{path: leaf} of a tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
