"""Pseudo-labels by optimal transport, and what is remembered for them over batches (DLLR, Han et al.).

Levels, costs and the class mass are our reading of "multi-level label reassignment as optimal transport".
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Bool, Float, Int

from sarjax.losses.contrastive import unit
from sarjax.losses.transport import class_frequencies, prediction_cost, prototype_cost, transport
from sarjax.models.resampling import adaptive_avg_pool, resize_bilinear
from sarjax.options import LabelReassignment

CELL = 8  # side of a region, in cells of the head's grid

Maps = Mapping[str, Float[Array, "b h w _"]]
Memory = dict[str, Array]


class Pseudo(NamedTuple):
    """Of one head, at the size of the image.

    argmax: the most probable class. label: the reassigned one. weight: how much it counts: the largest probability
    where all levels agree, else 0; 0 where the head has no data. covered: where it has. error: of the plans' class
    mass, the largest of the levels (`Plan.error`). asked: the mass that the classes were to have.
    """

    argmax: Int[Array, "b h w"]
    label: Int[Array, "b h w"]
    weight: Float[Array, "b h w"]
    covered: Bool[Array, "b h w"]
    error: Float[Array, ""]
    asked: Float[Array, " k"]


def initial(heads: Mapping[str, int], classes: int, queue: int) -> Memory:
    """Memory before the first batch; heads: {name: channels of its embedding}.

    frequencies: (k,), decaying sums of labelled shares. queue/<head>: (queue, k), mean predictions of past batches,
    filled from the front and then replaced in turn; filled: how many there ever were. prototypes/<head>: (k, d),
    decaying means of labelled features' directions; seen/<head>: (k,), 1 once there was one of that class.
    """
    memory = {"frequencies": jnp.zeros(classes), "filled": jnp.zeros((), jnp.int32)}
    for name, channels in heads.items():
        memory[f"seen/{name}"] = jnp.zeros(classes)
        memory[f"queue/{name}"] = jnp.zeros((queue, classes))
        memory[f"prototypes/{name}"] = jnp.zeros((classes, channels))
    return memory


def remembered(memory: Memory, features: Maps, shares: Maps, labelled: Float[Array, " k"], momentum: float) -> Memory:
    """Memory after labelled rows.

    shares: by head, of each class among each cell's pixels, where that head has data and they are labelled. labelled:
    how many pixels are of each class.
    """
    features, shares = lax.stop_gradient((dict(features), dict(shares)))
    total = jnp.sum(labelled)
    out = dict(memory)
    # Sums of decaying weights: their quotient is right from the first batch on.
    decayed = momentum * memory["frequencies"] + labelled / jnp.maximum(total, 1e-12)
    out["frequencies"] = jnp.where(total > 0, decayed, memory["frequencies"])
    for name, f in features.items():
        count, old, seen = jnp.sum(shares[name], (0, 1, 2)), memory[f"prototypes/{name}"], memory[f"seen/{name}"]
        # `where`, not a product: features of cells without a labelled pixel must not get through.
        direction = jnp.where(jnp.sum(shares[name], -1, keepdims=True) > 0, unit(f.astype(jnp.float32)), 0.0)
        sums = jnp.einsum("bhwk,bhwd->kd", shares[name], direction, precision=lax.Precision.HIGHEST)
        mean = sums / jnp.maximum(count, 1e-12)[:, None]
        decayed = jnp.where(seen[:, None] > 0, momentum * old + (1 - momentum) * mean, mean)
        out[f"prototypes/{name}"] = jnp.where(count[:, None] > 0, decayed, old)
        out[f"seen/{name}"] = jnp.maximum(seen, (count > 0).astype(jnp.float32))
    return out


def queued(memory: Memory, probabilities: Maps, masses: Mapping[str, Float[Array, "b h w"]]) -> Memory:
    """Memory after unlabelled rows: the heads' mean predictions take the place of the oldest."""
    out = dict(memory)
    some = jnp.asarray(True)
    for name, p in lax.stop_gradient(dict(probabilities)).items():
        total = jnp.sum(masses[name])
        some &= total > 0
        mean = jnp.einsum("bhwk,bhw->k", p, masses[name], precision=lax.Precision.HIGHEST) / jnp.maximum(total, 1e-12)
        queue = memory[f"queue/{name}"]
        out[f"queue/{name}"] = queue.at[memory["filled"] % len(queue)].set(mean)
    # A batch in which a head sees nothing leaves all queues as they are, so that they stay of one length.
    kept = {name: jnp.where(some, new, memory[name]) for name, new in out.items()}
    return kept | {"filled": memory["filled"] + some.astype(jnp.int32)}


def expected_mass(memory: Memory, head: str) -> Float[Array, " k"]:
    """Half the labelled frequencies, half the head's mean prediction over the queue; either where only it is known."""
    queue = memory[f"queue/{head}"]
    there = jnp.arange(len(queue)) < memory["filled"]
    predicted = jnp.sum(queue * there[:, None], 0)
    parts = [x / jnp.maximum(jnp.sum(x), 1e-12) for x in (memory["frequencies"], predicted)]
    both = sum(parts)
    return jnp.where(jnp.sum(both) > 0, both / jnp.maximum(jnp.sum(both), 1e-12), 1.0 / both.size)


def reassigned(
    probabilities: Float[Array, "b h w k"],
    features: Float[Array, "b h w d"],
    mass: Float[Array, "b h w"],
    memory: Memory,
    head: str,
    options: LabelReassignment,
) -> tuple[dict[str, Float[Array, "b h w k"]], Float[Array, ""], Float[Array, " k"]]:
    """Of each level that is asked for, which part of each cell goes to which class; the largest error; the class mass.

    mass: what each cell counts; cells of mass 0 go nowhere. One plan per level over the whole global batch.
    """
    asked = class_frequencies(expected_mass(memory, head), "uniform" if options.mass == "uniform" else "given")
    tau = options.relaxation if options.mass == "soft" else 1.0
    prototypes, seen = memory[f"prototypes/{head}"], memory[f"seen/{head}"]

    def plans(p, v, m, levels):
        """Shares of each level on one grid, and their errors."""
        k, flat = p.shape[-1], m.reshape(-1)
        costs = {}
        if "prediction" in levels:
            costs["prediction"] = prediction_cost(p.reshape(-1, k), kind=options.cost), options.epsilon
        if "prototype" in levels:
            cost = prototype_cost(v.reshape(-1, v.shape[-1]), prototypes, seen, flat)
            costs["prototype"] = cost, options.prototype_epsilon
        shares, errors = {}, []
        for name, (cost, epsilon) in costs.items():
            plan = transport(cost, flat, asked, epsilon=epsilon, tau_classes=tau, iterations=options.iterations)
            shares[name] = plan.shares().reshape(p.shape)
            errors.append(plan.error)
        return shares, errors

    wanted = [name for name in ("prediction", "prototype") if getattr(options, name)]
    shares, errors = plans(probabilities, features, mass, wanted)
    if options.region:
        h, w = mass.shape[1:]
        size = max(1, round(h / CELL)), max(1, round(w / CELL))
        weight = adaptive_avg_pool(mass[..., None], size)
        p, v = (
            adaptive_avg_pool(x.astype(jnp.float32) * mass[..., None], size) / jnp.maximum(weight, 1e-12)
            for x in (probabilities, unit(features.astype(jnp.float32)))
        )
        coarse, more = plans(p, v, weight[..., 0], ("prediction", "prototype"))
        row, column = (jnp.arange(n) * m // n for n, m in zip((h, w), size, strict=True))
        shares["region"] = (sum(coarse.values()) / len(coarse))[:, row][:, :, column]
        errors += more
    return shares, jnp.max(jnp.stack(errors)) if errors else jnp.zeros(()), asked


def pseudo_labels(
    logits: Float[Array, "b h' w' k"],
    features: Float[Array, "b h' w' d"],
    there: Bool[Array, "b h w"],
    memory: Memory,
    head: str,
    options: LabelReassignment,
) -> Pseudo:
    """Of the head's logits and features on its grid; there: where it has data, at the size of the image."""
    logits, features = lax.stop_gradient((logits, features))
    p = nn.softmax(resize_bilinear(logits, there.shape[1:]))
    mass = cell_mass(there, logits.shape[1:3])
    shares, error, asked = reassigned(nn.softmax(logits), features, mass, memory, head, options)
    likely = jnp.argmax(p, -1)
    weight, label = jnp.max(p, -1), likely
    if shares:
        fine = [resize_bilinear(x, likely.shape[1:]) for x in shares.values()]
        label = jnp.argmax(sum(fine), -1)
        for level in fine:
            weight = jnp.where(jnp.argmax(level, -1) == label, weight, 0.0)
    weight = jnp.where(there & (weight >= options.threshold), weight, 0.0)
    return Pseudo(likely, label, weight, there, error, asked)


def cell_mass(there: Bool[Array, "b h w"], size: tuple[int, int]) -> Float[Array, "b h' w'"]:
    """The share of each cell's pixels that count."""
    return adaptive_avg_pool(there.astype(jnp.float32)[..., None], size)[..., 0]
