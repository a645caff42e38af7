"""Class labels for pixels by optimal transport: plans between pixels and classes, and the costs that they are made of.

Nothing here is differentiated: every function stops gradients, since what comes out are targets. All in float32.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from ott.geometry.geometry import Geometry
from ott.solvers import linear

from sarjax.losses.contrastive import unit

DEAREST = 20.0  # of a class that a network gives no probability
FLOOR = 1e-3  # of a class's mass


class Plan(NamedTuple):
    """matrix: the mass of each pixel that goes to each class; its rows sum to the pixels' mass, whose total is 1.
    error: sum over classes of how far the columns are from what their relaxation asks for; 0 once converged.
    """

    matrix: Float[Array, "n k"]
    error: Float[Array, ""]

    def shares(self) -> Float[Array, "n k"]:
        """What part of its mass each pixel sends where; all 0 for a pixel without mass."""
        total = jnp.sum(self.matrix, axis=1, keepdims=True)
        return jnp.where(total > 0, self.matrix / jnp.where(total > 0, total, 1.0), 0.0)


def transport(
    cost: Float[Array, "n k"],
    pixel_mass: Float[Array, " n"],
    class_mass: Float[Array, " k"],
    *,
    epsilon: float,
    tau_pixels: float = 1.0,
    tau_classes: float = 1.0,
    iterations: int = 50,
) -> Plan:
    r"""Entropic optimal transport of pixels to classes, by a fixed number of Sinkhorn iterations in the log domain.

    .. math::
      \min_{T \ge 0} \langle T, C \rangle - \epsilon H(T) + \rho_a KL(T 1 \| a) + \rho_b KL(T^\top 1 \| b), \qquad
      H(T) = -\sum T (\log T - 1), \quad \rho = \epsilon \tau / (1 - \tau)

    a, b are the masses, each divided by its total; tau = 1 is exact mass. An iteration moves the classes, then the
    pixels, so with `tau_pixels` 1 rows are exact after any number of iterations, and what has not converged shows in
    `error`. Three iterations, a usual choice, misplace a tenth of the mass where classes are rare.

    Rows may be sharded: only sums over them are communicated.

    Args:
      cost: C, finite where there is mass.
      pixel_mass: >= 0, in any unit. A pixel of mass 0 gets a row of zeros, whatever its cost is.
      class_mass: >= 0, in any unit; a class of mass 0 gets a column of zeros.
      epsilon: of the entropy, in units of the cost.
      tau_pixels, tau_classes: in (0, 1]; below 1 the mass of rows or columns may differ from a or b.
      iterations: fixed, so that all devices and all batches take the same time.

    Returns:
      The plan; all zeros with error 0 where no pixel has mass.

    Source: Cuturi (2013); Chizat et al. (2018) for tau below 1. Solved by ott-jax.

    Example:
      >>> plan = transport(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.ones(2), jnp.ones(2), epsilon=0.1)
      >>> plan.matrix.round(3).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    cost, a, b = (lax.stop_gradient(x.astype(jnp.float32)) for x in (cost, pixel_mass, class_mass))
    some = jnp.sum(a) > 0
    counts = a > 0
    a = jnp.where(some, a, 1.0)
    a, b = a / jnp.sum(a), b / jnp.sum(b)
    solved = linear.solve(
        Geometry(jnp.where(counts[:, None], cost, 0.0), epsilon=epsilon),
        a,
        b,
        tau_a=tau_pixels,
        tau_b=tau_classes,
        min_iterations=iterations,
        max_iterations=iterations,
        inner_iterations=iterations,
        threshold=-1.0,
        implicit_diff=None,
        recenter_potentials=False,
    )
    matrix = jnp.where(some, solved.matrix, 0.0)
    asked = b
    if tau_classes < 1:
        rho = epsilon * tau_classes / (1 - tau_classes)
        asked = jnp.where(b > 0, b * jnp.exp(-solved.g / rho), 0.0)
    error = jnp.sum(jnp.abs(jnp.sum(matrix, axis=0) - asked))
    return Plan(lax.stop_gradient(matrix), lax.stop_gradient(jnp.where(some, error, 0.0)))


def prediction_cost(
    probabilities: Float[Array, "n k"], *, kind: Literal["log", "linear"] = "log"
) -> Float[Array, "n k"]:
    """What it costs a pixel to be of a class, by its prediction p.

    "log": min(-log p, `DEAREST`). With epsilon 1 and exact rows the plan is p times a factor per class, p again where
    these are 1: the predictions corrected for another frequency of classes. "linear": 1 - p, for a small epsilon.
    """
    p = lax.stop_gradient(probabilities.astype(jnp.float32))
    if kind not in ("log", "linear"):
        raise ValueError(f"no kind of prediction cost is called {kind!r}: 'log' and 'linear' are")
    return jnp.minimum(-jnp.log(jnp.maximum(p, 1e-30)), DEAREST) if kind == "log" else 1.0 - p


def prototype_cost(
    features: Float[Array, "n d"],
    prototypes: Float[Array, "k d"],
    seen: Float[Array, " k"],
    pixel_mass: Float[Array, " n"],
) -> Float[Array, "n k"]:
    """(1 - cos(feature, prototype)) / 2, divided by its mean over pixels with mass and classes that were seen.

    A class that was not seen costs 1 before the division, as much as the opposite direction. Undivided costs leave
    Sinkhorn far from converged at a small epsilon. Where there is no pixel with mass or no class, nothing is divided.
    """
    v, mu = (lax.stop_gradient(x.astype(jnp.float32)) for x in (features, prototypes))
    cosine = jnp.matmul(unit(v), unit(mu).T, precision=lax.Precision.HIGHEST)
    cost = jnp.where(seen > 0, 0.5 * (1.0 - cosine), 1.0)
    weight = lax.stop_gradient((pixel_mass > 0).astype(jnp.float32)[:, None] * (seen > 0))
    total = jnp.sum(weight)
    mean = jnp.sum(jnp.where(weight > 0, cost, 0.0)) / jnp.maximum(total, 1.0)
    return cost / jnp.where(mean > 0, mean, 1.0)


def class_frequencies(frequencies: Float[Array, " k"], kind: Literal["given", "uniform"] = "given"):
    """The mass of each class: the frequencies with a floor of `FLOOR`, or equal; their sum is 1."""
    if kind == "uniform":
        return jnp.full(frequencies.shape, 1.0 / frequencies.size, jnp.float32)
    raised = jnp.maximum(lax.stop_gradient(frequencies.astype(jnp.float32)), FLOOR)
    return raised / jnp.sum(raised)
