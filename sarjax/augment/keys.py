"""Random keys per row, so that a draw depends on the row and on nothing else."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, PRNGKeyArray


def row_keys(key: PRNGKeyArray, batch: Mapping[str, Array]) -> PRNGKeyArray:
    """One key per row: `fold_in(key, row)` with `batch["row"]` (b,), the row's index in the global batch.

    Positions in the local array would do on one device only: the same row sits elsewhere in a microbatch.
    Needs JAX's default generator: draws of "rbg" keys under vmap depend on the whole batch.
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["row"])
