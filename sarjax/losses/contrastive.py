"""Contrastive clustering (Li et al., "Contrastive Clustering", AAAI 2021), as Cheng et al. use it as an auxiliary task.

Equations (1) and (2) of Cheng et al. lack a logarithm and an exponential, and mix up indices; what is here is the form
that the public code of Contrastive Clustering computes. Both losses couple all rows of the batch: under `jit` over a
sharded batch they are those of the global one, and a microbatch sees itself alone.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pair = tuple[Float[Array, ""], Float[Array, ""]]

SMALLEST_NORM = 1e-12


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Rows of length 1; rows that are shorter than 1e-12 become zeros, with gradient 0 rather than NaN."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    seen = square > SMALLEST_NORM**2
    return jnp.where(seen, x * lax.rsqrt(jnp.where(seen, square, 1.0)), 0.0)


def instance_loss(
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    *,
    temperature: float = 0.5,
    include_self: bool = False,
) -> Pair:
    r"""Each row of `a` has its partner in the same row of `b`; the other 2 n - 2 rows are its negatives.

    .. math::
      z = [a; b], \quad l_i = -s_{ii'} / \tau + \log \sum_{k \in D(i)} \exp(s_{ik} / \tau), \quad
      L = \frac{1}{2n} \sum_i l_i, \quad s_{ik} = z_i \cdot z_k

    Args:
      a, b: rows of length 1 (`unit`); they are not normalised here. Computed in float32.
      temperature: tau > 0.
      include_self: D(i) = all rows, as the denominators of Cheng et al. read; False: all but i itself (public code).

    Returns:
      (total, weight) with weight 2 n. 0 for n = 1, where there is nothing to tell apart.

    Example:
      >>> total, weight = instance_loss(jnp.eye(2), jnp.eye(2))
      >>> round(float(total / weight), 4)
      0.2395
    """
    n = a.shape[0]
    loss = _contrast(jnp.concatenate([a, b]).astype(jnp.float32), temperature, include_self)
    return jnp.sum(loss), jnp.asarray(2.0 * n, jnp.float32)


def cluster_loss(
    a: Float[Array, "n m"],
    b: Float[Array, "n m"],
    *,
    temperature: float = 1.0,
    include_self: bool = False,
    weights: Float[Array, " n"] | None = None,
    entropy: bool = True,
) -> Pair:
    r"""The same over clusters, by which rows they hold, and the entropy of their sizes, which keeps any from emptying.

    .. math::
      L = \frac{1}{2m} \sum_i \hat l_i - H(Y) + 2 \log m, \quad H(Y) = -\sum_{v \in \{a, b\}} \sum_j P_{vj} \log P_{vj}

    with :math:`\hat l` as in `instance_loss`, of the 2 m columns of the assignments and their cosines, and
    :math:`P_{vj}` the mean of column j. The constant makes the second part of a perfectly balanced assignment 0.

    Args:
      a, b: assignments of each row's two views to m clusters, >= 0, each row adding up to 1. An empty cluster is
        orthogonal to all others and has no gradient from its direction. Computed in float32.
      temperature: tau > 0.
      include_self: see `instance_loss`.
      weights: of the rows, >= 0, in the cosines of columns (None = 1 each).
      entropy: False leaves out the second part.

    Returns:
      (total, weight) with weight n: the value is that of the batch, weighted by its rows.

    Example:
      >>> total, weight = cluster_loss(jnp.eye(2), jnp.eye(2))
      >>> round(float(total / weight), 4)
      0.5514
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    n, m = a.shape
    weight = jnp.asarray(float(n), jnp.float32)
    columns = jnp.concatenate([a.T, b.T])
    if weights is not None:
        columns = columns * jnp.sqrt(weights.astype(jnp.float32))
    contrast = jnp.mean(_contrast(unit(columns), temperature, include_self))
    if not entropy:
        return contrast * weight, weight
    share = jnp.stack([a.mean(0), b.mean(0)])
    share = share / jnp.sum(share, axis=-1, keepdims=True)
    value = contrast - jnp.sum(jax.scipy.special.entr(jnp.maximum(share, 1e-30))) + 2 * jnp.log(float(m))
    return value * weight, weight


def _contrast(z: Float[Array, "2n d"], temperature: float, include_self: bool) -> Float[Array, " 2n"]:
    """-s(i, i') / tau + log sum_k exp(s(i, k) / tau) for every row; partners are half of the rows apart."""
    rows = z.shape[0]
    similarity = jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST) / temperature
    index = jnp.arange(rows)
    partner = (index[:, None] + rows // 2) % rows == index
    if not include_self:
        similarity = jnp.where(index[:, None] == index, -jnp.inf, similarity)
    positive = jnp.sum(jnp.where(partner, similarity, 0.0), axis=1)
    return jax.nn.logsumexp(similarity, axis=1) - positive
