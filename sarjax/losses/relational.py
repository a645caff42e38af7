"""Relations within a student's features against those within its teacher's: FRD (Wang et al.), and RKD's distances.

A relation (a distance, an angle to a mean) has no channels, so networks of any width can be compared. Features of two
dates are (b, 2, h, w, c). `cells` (b, h, w, k) is the share of each class in every cell of their grid.
A cell without any share counts in nothing. Means and class means are those of the global batch: the losses **couple**
its rows. The source is an abstract; the formulas are our reading of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sarjax.losses.contrastive import cluster_loss, unit

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def norm(x: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """Lengths of rows; the gradient of a row of zeros is 0 rather than NaN."""
    square = jnp.sum(x * x, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def relative_distances(x: Float[Array, "n d"], present: Bool[Array, " n"] | None = None) -> Float[Array, "n n"]:
    r"""Distances between rows, over their mean.

    .. math:: \psi_{uv} = \|x_u - x_v\| / \mu, \quad \mu = \text{mean of the distances above 0}

    Computed from differences, not from a Gram matrix, in which close rows would cancel.

    Args:
      x: rows; computed in float32.
      present: which rows count (None = all); distances of others are 0 and in no mean.

    Returns:
      (n, n), 0 on the diagonal; all 0 where no two rows differ.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, equation 6; its public code.

    Example:
      >>> [float(v) for v in relative_distances(jnp.array([[0.0], [1.0], [3.0]]))[0]]
      [0.0, 0.5, 1.5]
    """
    x = x.astype(jnp.float32)
    present = jnp.ones(len(x), bool) if present is None else present
    pairs = present[:, None] & present
    # Replaced, not multiplied by 0: the mean of a class that is not there may be anything.
    x = jnp.where(present[:, None], x, 0.0)
    distances = jnp.where(pairs, norm(x[:, None] - x), 0.0)
    return _over_mean(distances, (distances > 0).astype(jnp.float32))


def relational_distance(
    student: Float[Array, "n d"], teacher: Float[Array, "n e"], present: Bool[Array, " n"] | None = None
) -> Pair:
    r"""Smooth-L1 between the relative distances of a student's rows and of its teacher's.

    .. math:: total = \sum_{uv} l(\psi^S_{uv} - \psi^T_{uv}), \quad weight = n^2

    over rows that are `present`, the diagonal included as in the public code. The gradient flows through the student's
    mean too, and into the student alone.

    Example:
      >>> rows = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
      >>> total, weight = relational_distance(rows, 7 * rows)
      >>> round(float(total), 6), float(weight)
      (0.0, 9.0)
    """
    present = jnp.ones(len(student), bool) if present is None else present
    ours, theirs = (relative_distances(x, present) for x in (student, lax.stop_gradient(teacher)))
    return jnp.sum(smooth_l1(ours - theirs)), jnp.sum(present.astype(jnp.float32)) ** 2


def smooth_l1(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x^2 / 2 up to 1, |x| - 1 / 2 beyond."""
    return optax.losses.huber_loss(x, delta=1.0)


def pixel_distance(
    student: Float[Array, "b 2 h w c"],
    teacher: Float[Array, "b 2 h w e"],
    cells: Float[Array, "b h w k"],
    *,
    balanced: bool = True,
) -> Pair:
    r"""BFDD by pixel: how far a pixel's features of the two dates lie apart, over the mean of that, as in the teacher.

    .. math::
      d_X(p) = \|F_1(p) - F_2(p)\|, \quad l_p = smoothL1(d_S(p) / \bar d_S - d_T(p) / \bar d_T)

    Args:
      student, teacher: features of the same grid.
      cells: share of each class.
      balanced: every class that is there counts alike, by the mean of its cells; else every pixel.

    Returns:
      (total, weight): weight is the number of classes that are there, or of pixels; (0, 0) where nothing counts.

    Source: FRD's bitemporal feature distance distillation.
    """
    mass = jnp.sum(cells, -1)
    ours, theirs = (
        _over_mean(norm(d), mass) for d in (_change(student, mass), lax.stop_gradient(_change(teacher, mass)))
    )
    loss = smooth_l1(ours - theirs)
    return _by_class(loss, cells) if balanced else (jnp.sum(mass * loss), jnp.sum(mass))


def category_distance(
    student: Float[Array, "b 2 h w c"], teacher: Float[Array, "b 2 h w e"], cells: Float[Array, "b h w k"]
) -> Pair:
    """BFDD by category: `relational_distance` of the means of each class at each date.

    2 k rows, date by date; those of a class that is not there are left out. For k = 2 these are four: what did not
    change and what did, before and after. (0, 0) where only one class is there: the one distance of its two means is
    its own mean.
    """
    present = jnp.sum(cells, (0, 1, 2)) > 0
    rows = _class_means(student, cells), _class_means(teacher, cells), jnp.tile(present, 2)
    return _if_several(present, *relational_distance(*rows))


class Shares(NamedTuple):
    """log_p: (b, h, w, k) log of the share of each class in a cell's difference; present: (k,) classes that are there,
    the share of others is 0 (log_p: -inf).
    """

    log_p: Float[Array, "b h w k"]
    present: Bool[Array, " k"]


def difference_shares(
    features: Float[Array, "b 2 h w c"], cells: Float[Array, "b h w k"], *, sharpness: float = 0.1
) -> Shares:
    r"""Which class the direction of each cell's difference resembles.

    .. math::
      z = \frac{|d|}{\sqrt{\|d\|^2 + \epsilon^2}}, \quad d = F_1 - F_2, \quad
      \mu_k = unit(\text{mean of } z \text{ over class } k), \quad P = softmax_k(z \cdot \mu_k / \tau)

    sharpness: tau > 0. epsilon is 1e-3 of the root mean square of all :math:`\|d\|`: next to nothing in z, but the
    direction of a difference that is nearly 0 would have a gradient without bound. Without any difference z is 0,
    shares are equal and gradients 0.
    """
    mass = jnp.sum(cells, -1)
    z = _direction(jnp.abs(_change(features, mass)), mass)
    count = jnp.sum(cells, (0, 1, 2))
    means = jnp.einsum("bhwk,bhwc->kc", cells, z, precision=lax.Precision.HIGHEST)
    means = unit(means / jnp.where(count > 0, count, 1.0)[:, None])
    scores = jnp.einsum("bhwc,kc->bhwk", z, means, precision=lax.Precision.HIGHEST) / sharpness
    present = count > 0
    # Where nothing counts at all, all scores would be -inf and their softmax NaN.
    scores = jnp.where(present | ~jnp.any(present), scores, -jnp.inf)
    return Shares(jax.nn.log_softmax(scores), present)


def share_divergence(student: Shares, teacher: Shares, cells: Float[Array, "b h w k"]) -> Pair:
    """CCRD by pixel: KL(P_T || P_S), every class counting alike; (0, 0) where only one class is there.

    Source: FRD's contrastive cluster representation distillation.
    """
    log_t, log_s = (jnp.where(s.present, s.log_p, 0.0) for s in (teacher, student))
    p = jnp.where(teacher.present, jnp.exp(log_t), 0.0)
    total, weight = _by_class(jnp.sum(lax.stop_gradient(p) * (lax.stop_gradient(log_t) - log_s), -1), cells)
    return _if_several(teacher.present, total, weight)


def share_columns(
    student: Shares, teacher: Shares, cells: Float[Array, "b h w k"], *, temperature: float = 1.0
) -> Pair:
    r"""CCRD by cluster: `cluster_loss` of the columns of P_S against those of P_T, without the entropy of their sizes.

    Cosines of columns weigh the cell p by :math:`w_p = \sum_k m_{pk} / (K n_k)`, m its share and n the sum of shares of
    class k: all classes count alike, however few pixels changed. Exact over the whole batch: products of columns are
    sums over pixels, so no pixel leaves its device.

    What the teacher scores against itself is subtracted, a constant: a student of the same shares scores 0. That is not
    the least there is: like every contrast of clusters this one pushes classes apart, beyond what the teacher does.

    Returns:
      (total, weight) with weight 1, and (0, 0) unless all classes are there.
    """
    count = jnp.sum(cells, (0, 1, 2))
    weights = jnp.sum(cells / jnp.where(count > 0, count, 1.0), -1) / jnp.maximum(jnp.sum(count > 0), 1)
    ours, theirs = (jnp.exp(s.log_p).reshape(-1, s.log_p.shape[-1]) for s in (student, teacher))
    theirs = lax.stop_gradient(theirs)
    how = {"temperature": temperature, "weights": weights.reshape(-1), "entropy": False}
    one = jnp.ones(())
    value = _quotient(*cluster_loss(ours, theirs, **how)) - _quotient(*cluster_loss(theirs, theirs, **how))
    # A class that is not there has an empty column, which is orthogonal to all: no contrast to learn from.
    there = jnp.all(teacher.present) & (len(count) > 1)
    return jnp.where(there, value, 0.0), jnp.where(there, one, 0.0)


def drawn_channels(key: PRNGKeyArray, channels: int, number: int) -> Float[Array, " channels"]:
    """1 for `number` of `channels`, drawn without replacement, 0 for the others.

    Features times this have the distances of features of the chosen channels alone, and no gather.
    """
    return (jax.random.permutation(key, channels) < number).astype(jnp.float32)


def _change(features: Float[Array, "b 2 h w c"], mass: Float[Array, "b h w"]) -> Float[Array, "b h w c"]:
    """F_1 - F_2 in float32; 0 in cells that do not count, so that what is not finite there does not show."""
    features = features.astype(jnp.float32)
    return jnp.where(mass[..., None] > 0, features[:, 0] - features[:, 1], 0.0)


def _direction(d: Float[Array, "b h w c"], mass: Float[Array, "b h w"]) -> Float[Array, "b h w c"]:
    """Differences of length 1; those that are small beside the mean length are shorter."""
    square = jnp.sum(d * d, -1, keepdims=True)
    seen = (mass > 0)[..., None]
    floor = 1e-6 * _quotient(jnp.sum(jnp.where(seen, square, 0.0)), jnp.sum(seen.astype(jnp.float32)))
    length = square + lax.stop_gradient(floor)
    return jnp.where(length > 0, d * lax.rsqrt(jnp.where(length > 0, length, 1.0)), 0.0)


def _class_means(features: Float[Array, "b 2 h w c"], cells: Float[Array, "b h w k"]) -> Float[Array, "2k c"]:
    """Means over the cells of each class at each date; rows of classes that are not there are 0."""
    count = jnp.sum(cells, (0, 1, 2))
    seen = jnp.sum(cells, -1)[:, None, ..., None] > 0
    features = jnp.where(seen, features.astype(jnp.float32), 0.0)
    sums = jnp.einsum("bthwc,bhwk->tkc", features, cells, precision=lax.Precision.HIGHEST)
    return (sums / jnp.where(count > 0, count, 1.0)[:, None]).reshape(-1, features.shape[-1])


def _by_class(loss: Float[Array, "b h w"], cells: Float[Array, "b h w k"]) -> Pair:
    """Sum over the classes that are there of the mean loss of their cells, and how many these are."""
    count = jnp.sum(cells, (0, 1, 2))
    means = jnp.sum(loss[..., None] * cells, (0, 1, 2)) / jnp.where(count > 0, count, 1.0)
    return jnp.sum(means), jnp.sum((count > 0).astype(jnp.float32))


def _over_mean(distances: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`distances` over their weighted mean; 0 where that is 0."""
    mean = _quotient(jnp.sum(weights * distances), jnp.sum(weights))
    return _quotient(distances, mean)


def _quotient(a: Float[Array, "*shape"], b: Float[Array, ""]) -> Float[Array, "*shape"]:
    """a / b, and 0 with gradient 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def _if_several(present: Bool[Array, " k"], total: Float[Array, ""], weight: Float[Array, ""]) -> Pair:
    several = jnp.sum(present) > 1
    return jnp.where(several, total, 0.0), jnp.where(several, weight, 0.0)
