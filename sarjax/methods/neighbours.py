"""Exact nearest neighbours among the rows of a feature bank, by blocked matrix products on device."""

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
    is, share each block.
    """
    n = bank.shape[0]
    rows = unit(bank.astype(jnp.float32))
    index = jnp.arange(n)

    def block(start: Int[Array, ""]) -> Int[Array, "block k"]:
        query = _shared(lax.dynamic_slice_in_dim(rows, start, BLOCK))
        similarity = jnp.matmul(query, rows.T, precision=lax.Precision.HIGHEST)
        mine = start + jnp.arange(BLOCK)
        allowed = valid & (mine[:, None] != index)
        similarity = jnp.where(allowed, similarity, -jnp.inf)
        value, found = lax.top_k(similarity, k)
        return jnp.where((value > -jnp.inf) & valid[mine][:, None], found, -1).astype(jnp.int32)

    return lax.map(block, jnp.arange(0, n, BLOCK)).reshape(n, k)


def _shared(query: Float[Array, "block d"]) -> Float[Array, "block d"]:
    """Rows over "data" and "fsdp": left to itself the compiler has every device look up all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    if shards == 1 or len(query) % shards:
        return query
    return lax.with_sharding_constraint(query, PartitionSpec(("data", "fsdp")))
