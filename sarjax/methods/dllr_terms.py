"""What DLLR asks of unlabelled rows: complementary learning and supervision by pseudo-labels (Han et al.).

The source states the ideas; distances, weights and the ramp are our design.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sarjax.losses.pixel import cross_entropy
from sarjax.methods import reassignment
from sarjax.methods.reassignment import Pseudo
from sarjax.methods.record import Term
from sarjax.models.dllr import FUSED, SENSORS
from sarjax.options import LabelReassignment
from sarjax.spec import IGNORE_LABEL

HEADS = (FUSED, *SENSORS)

Present = dict[str, Bool[Array, " b"]]  # of each sensor, whether a row has it
Covered = dict[str, Bool[Array, "b h w"]]  # of each sensor or head, where it has data
Logits = dict[str, Float[Array, "b _ _ k"]]


def present_in(where: Covered) -> Present:
    """Whether a sensor has any data in a row."""
    return {m: where[m].any((1, 2)) for m in SENSORS}


def covered_by_any(where: Covered, present: Present) -> Bool[Array, "b h w"]:
    """Where the fused head sees anything."""
    sar, optical = (where[m] & present[m][:, None, None] for m in ("sar", "optical"))
    return sar | optical


def withheld(present: Present, keys: PRNGKeyArray, share: float) -> Present:
    """In `share` of the rows that have both, one of them is withheld, either as often."""
    if not share:
        return present
    u = jax.vmap(jax.random.uniform)(keys)
    both = present["sar"] & present["optical"]
    drops = {"optical": u < share / 2, "sar": (u >= share / 2) & (u < share)}
    return {m: present[m] & ~(both & drops[m]) for m in SENSORS}


def ramp_up(step: Int[Array, ""], steps: float) -> Float[Array, ""] | float:
    """exp(-5 (1 - t)^2) with t from 0 to 1 over the first `steps`; 1 where they are 0."""
    return jnp.exp(-5.0 * (1.0 - jnp.clip(step / steps, 0.0, 1.0)) ** 2) if steps else 1.0


def complementary_loss(
    logits: Float[Array, "b h' w' k"], others: Float[Array, "b h' w' k"], where: Bool[Array, "b h w"]
) -> tuple[Array, Array]:
    """What one sensor's head learns from the other's where they differ: KL(other || own), weighted by their distance.

        total = sum_p d_p w_p KL(sg p' || p),   weight = sum_p d_p w_p,   d = sg |p - p'|_1 / 2

    where: pixels that the other sees; cells count by their share. Differs from a mean in that agreement costs nothing.
    """
    log_p, log_q = jax.nn.log_softmax(logits), lax.stop_gradient(jax.nn.log_softmax(others))
    q = jnp.exp(log_q)
    distance = lax.stop_gradient(0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - q), -1))
    weight = distance * reassignment.cell_mass(where, logits.shape[1:3])
    return jnp.sum(weight * jnp.sum(q * (log_q - log_p), -1)), jnp.sum(weight)


def complementary_terms(logits: Logits, there: Covered, visible: Covered, factor: Array | float) -> dict[str, Term]:
    """Each sensor's head learns from the other's where both have data and the other is not masked; half of `factor`
    each.
    """
    terms = {}
    for m, other in zip(SENSORS, reversed(SENSORS), strict=True):
        where = there[m] & there[other] & visible[other]
        terms[f"complementary_{m}"] = Term(*complementary_loss(logits[m], logits[other], where), 0.5 * factor)
    return terms


def pseudo_terms(
    options: LabelReassignment, logits: Logits, learns_at: Covered, pseudo: dict[str, Pseudo], ramp: Array | float
) -> dict[str, Term]:
    """Supervision by pseudo-labels: each sensor by the other's (options.cross), all by the fused head's
    (options.consistency, half of it for a sensor).

    logits: at the size of the labels. learns_at: where each head has data.
    """

    def by(head: str, teacher: str) -> tuple[Array, Array]:
        """A mean over the pixels that both have, labels of weight 0 among them."""
        weight = jnp.where(learns_at[head], pseudo[teacher].weight, 0.0)
        total, _ = cross_entropy(logits[head], pseudo[teacher].label, pixel_weights=weight)
        return total, jnp.sum((learns_at[head] & pseudo[teacher].covered).astype(jnp.float32))

    terms = {}
    if options.cross:
        for m, other in zip(SENSORS, reversed(SENSORS), strict=True):
            terms[f"cross_{m}"] = Term(*by(m, other), options.cross * ramp)
    if options.consistency:
        for head, share in ((FUSED, 1.0), *((m, 0.5) for m in SENSORS)):
            terms[f"consistency_{head}"] = Term(*by(head, FUSED), share * options.consistency * ramp)
    return terms


def pseudo_metrics(pseudo: dict[str, Pseudo], truth: Int[Array, "b h w"]) -> dict[str, Term]:
    """Of the fused head: how often its likeliest and its reassigned class are right, how much its labels count, how far
    the class mass is from the truth's. Of all: the largest error of the plans.
    """
    one = jnp.ones(())
    found = pseudo[FUSED]
    known = found.covered & (truth != IGNORE_LABEL)
    count = jnp.sum(known.astype(jnp.float32))
    classes = found.asked.size
    shares = jnp.sum((truth[..., None] == jnp.arange(classes)) & known[..., None], (0, 1, 2)) / jnp.maximum(count, 1.0)
    hits = {"argmax": found.argmax, "reassigned": found.label}
    return {
        **{
            f"pseudo_{name}": Term(jnp.sum((x == truth) & known).astype(jnp.float32), count) for name, x in hits.items()
        },
        "pseudo_weight": Term(jnp.sum(found.weight), jnp.sum(found.covered.astype(jnp.float32))),
        "mass_error": Term(jnp.where(count > 0, jnp.sum(jnp.abs(found.asked - shares)), 0.0), one),
        "transport_error": Term(jnp.max(jnp.stack([p.error for p in pseudo.values()])), one),
    }
