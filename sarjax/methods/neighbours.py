"""Exact nearest neighbours among the rows of a feature bank, by blocked matrix products on device."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sarjax.losses.contrastive import unit
from sarjax.options.scene_clustering import MOST_NEIGHBOURS

BLOCK = 256
ROWS = MOST_NEIGHBOURS  # banks are padded to a multiple: their size depends on the data, never on the mesh


def padded(rows: int) -> int:
    """The rows of a bank for `rows` tiles."""
    return -(-rows // ROWS) * ROWS


def nearest(bank: Float[Array, "n d"], valid: Bool[Array, " n"], k: int) -> Int[Array, "n k"]:
    """Indices of the k valid rows with the largest cosine to each row, itself excluded, nearest first; -1 = none.

    n: a multiple of `BLOCK`. Rows that are not valid are nobody's neighbour and have none. Of equal cosines the lower
    index comes first. Holds BLOCK x n similarities at a time, never n x n. The devices of the mesh that is set, if one
    is and n is a multiple of their number, each look up an equal part of the rows.
    """
    index = jnp.arange(bank.shape[0])
    rows = unit(bank.astype(jnp.float32))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(index) % mesh.size:
        return _lookup(index, rows, valid, k)
    # Left to itself the compiler has every device look up all of them.
    part, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    lookup = jax.shard_map(functools.partial(_lookup, k=k), in_specs=(part, whole, whole), out_specs=part)
    return lax.with_sharding_constraint(lookup(index, rows, valid), whole)


def _lookup(index: Int[Array, " m"], rows: Float[Array, "n d"], valid: Bool[Array, " n"], k: int) -> Int[Array, "m k"]:
    """`nearest` of the rows of an index."""

    def block(mine: Int[Array, " block"]) -> Int[Array, "block k"]:
        similarity = jnp.matmul(rows[mine], rows.T, precision=lax.Precision.HIGHEST)
        allowed = valid & (mine[:, None] != jnp.arange(len(rows)))
        similarity = jnp.where(allowed, similarity, -jnp.inf)
        value, found = lax.top_k(similarity, k)
        return jnp.where((value > -jnp.inf) & valid[mine][:, None], found, -1).astype(jnp.int32)

    return lax.map(block, index.reshape(-1, math.gcd(BLOCK, len(index)))).reshape(-1, k)
