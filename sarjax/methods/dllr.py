"""DLLR (Han et al.): SAR and optical images teach each other; labels of unlabelled pixels by optimal transport.

The source's abstract states asymmetric masking, difference-guided complementary learning (DCL), multi-level label
reassignment by optimal transport, and multimodal-consistency cross pseudo-supervision; layers, weights, costs and
schedules are ours. Every part has a switch in the options.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from sarjax.augment.inputs import channel_count, channel_names, has_data, network_inputs, tile_statistics
from sarjax.augment.keys import row_keys
from sarjax.augment.masking import asymmetric_masks
from sarjax.errors import UserError
from sarjax.methods import reassignment
from sarjax.methods.dllr_terms import (
    HEADS,
    Covered,
    Present,
    complementary_terms,
    covered_by_any,
    present_in,
    pseudo_metrics,
    pseudo_terms,
    ramp_up,
    withheld,
)
from sarjax.methods.reassignment import Pseudo
from sarjax.methods.record import Batch, Context, Head, Method, Outputs, Rest, Term, Tree, Variables
from sarjax.methods.streams import augmented, interleaved, separated
from sarjax.methods.supervised import SIZE_AT_INIT, class_weights, supervised_terms
from sarjax.models import build_network
from sarjax.models.dllr import FUSED, SENSORS, Views
from sarjax.models.segmenters import Prediction, resized
from sarjax.options import DLLR, LabelReassignment
from sarjax.spec import IGNORE_LABEL, Stream

UNLABELLED = "unlabelled"  # the stream
ROLE = 0xD118  # folded into keys
LARGEST_ERROR = 1e-2  # of the class mass


def dllr(options: LabelReassignment, context: Context) -> Method:
    """Heads: "fused" reads both sensors, "sar" and "optical" one each.

    Objective: plain supervision of every head on labelled rows + r (options.cross L_cps + options.consistency L_mc +
    options.complementary L_dcl) on unlabelled ones, r = exp(-5 (1 - t)^2) over the first `ramp` of the training.
    Pseudo-labels come from a pass over unmasked images without gradient, under the batch's statistics.
    """
    experiment, spec, statistics = context.experiment, context.spec, context.statistics
    inputs, augment = experiment.inputs, experiment.augment
    _check(options, context)
    alone = {m: dataclasses.replace(inputs, modalities=(m,)) for m in SENSORS}
    names = channel_names(inputs, spec)
    groups = tuple(tuple(i for i, n in enumerate(names) if n.startswith((f"{m}[", f"{m}."))) for m in SENSORS)
    network = build_network(experiment.network, spec.num_classes, jnp.dtype(experiment.precision)).clone(groups=groups)
    weights = class_weights(options, spec, statistics, experiment.data.labelled)
    learns = bool(options.unlabelled)
    assigns = learns and bool(options.cross or options.consistency)

    def views(params: Tree, stats: Tree, image: Array, present: Present) -> tuple[Views, Tree]:
        variables = {"params": params, "batch_stats": stats}
        out, updates = network.apply(variables, image, True, present, method="views", mutable=["batch_stats"])
        return out, updates["batch_stats"]

    def covered(rows: Batch) -> Covered:
        """Where each sensor has data."""
        return {m: has_data(rows, alone[m], spec) for m in SENSORS}

    def masked(rows: Batch, visible: Covered) -> Array:
        """Inputs in which what is not visible is as what has no data, also to means over neighbours."""
        rows = dict(rows)
        for m in SENSORS:
            if inputs.normalisation == "tile":  # of the whole tile, as for its pseudo-labels
                rows[f"{m}_mean"], rows[f"{m}_std"] = tile_statistics(rows[m], rows[f"{m}_valid"])
            rows[f"{m}_valid"] = jnp.where(visible[m][:, None], rows[f"{m}_valid"], 0)
        return network_inputs(rows, inputs, spec, statistics)

    def init(key: jax.Array) -> Variables:
        image = jnp.zeros((1, SIZE_AT_INIT, SIZE_AT_INIT, channel_count(inputs, spec)), jnp.float32)
        variables = network.init(key, image, False, method="views")
        memory = {}
        if assigns:
            found = jax.eval_shape(lambda v: network.apply(v, image, False, method="views"), variables)
            channels = {head: found.embeddings[head].shape[-1] for head in HEADS}
            memory = reassignment.initial(channels, spec.num_classes, options.queue)
        return Variables(variables["params"], variables["batch_stats"], memory)

    def loss(params: Tree, rest: Rest, batch: Tree, key: jax.Array, step: jax.Array):
        _, rows = augmented(batch["labelled"], key, augment, spec)
        image, where = network_inputs(rows, inputs, spec, statistics), covered(rows)
        present = withheld(present_in(where), row_keys(jax.random.fold_in(key, ROLE), rows), options.dropout)
        where |= {FUSED: covered_by_any(where, present)}
        if not learns:
            found, stats = views(params, rest.stats, image, present)
            terms, metrics = _supervision(found, rows["label"], where)
            return terms, Outputs(stats, rest.memory, metrics)

        n = len(image)
        _, free = augmented(batch[UNLABELLED], key, augment, spec, ROLE)
        whole, there = network_inputs(free, inputs, spec, statistics), covered(free)
        drop, hide = (row_keys(jax.random.fold_in(key, ROLE + i), free) for i in (1, 2))
        free_present = withheld(present_in(there), drop, options.dropout)
        visible = _visible(hide, there, free_present)
        learns_at = there | {FUSED: covered_by_any(there, free_present)}
        there |= {FUSED: covered_by_any(there, present_in(there))}
        both = {m: interleaved(present[m], free_present[m]) for m in SENSORS}
        found, stats = views(params, rest.stats, interleaved(image, masked(free, visible)), both)
        ours, theirs = (jax.tree.map(lambda x, i=i: separated(x, n)[i], found) for i in (0, 1))
        terms, metrics = _supervision(ours, rows["label"], where)

        ramp = ramp_up(step, options.ramp * context.schedule.steps)
        if options.complementary:
            terms |= complementary_terms(theirs.logits, there, visible, options.complementary * ramp)
        if not assigns:
            return terms, Outputs(stats, rest.memory, metrics)

        unmasked = views(lax.stop_gradient(params), rest.stats, whole, present_in(there))[0]
        memory = _learnt(rest.memory, ours, rows["label"], where, unmasked, there)
        pseudo = _pseudo(unmasked, there, memory)
        logits = {head: resized(y, whole.shape[1:3]) for head, y in theirs.logits.items()}
        terms |= pseudo_terms(options, logits, learns_at, pseudo, ramp)
        metrics |= pseudo_metrics(pseudo, free["hidden_label"])
        return terms, Outputs(stats, memory, metrics)

    def _supervision(found: Views, label: Array, where: Covered) -> tuple[dict[str, Term], dict[str, Term]]:
        terms, metrics = {}, {}
        for head in HEADS:
            known = jnp.where(where[head], label, IGNORE_LABEL)
            prediction = Prediction(resized(found.logits[head], label.shape[1:3]), None, {}, {}, found.embeddings[head])
            parts, shares = supervised_terms(options, experiment.network.NAME, prediction, known, weights)
            terms |= {f"{name}_{head}": term for name, term in parts.items()}
            metrics |= {name if head == FUSED else f"{name}_{head}": term for name, term in shares.items()}
        return terms, metrics

    def _visible(keys: jax.Array, there: Covered, present: Present) -> Covered:
        """Where each sensor's image is not masked: all of it where the other has no data, or is withheld."""
        if not options.cell:
            return {m: jnp.ones_like(there[m]) for m in SENSORS}
        h, w = there["sar"].shape[1:]
        masks = asymmetric_masks(keys, h, w, cell=options.cell, optical=options.mask_optical, sar=options.mask_sar)
        alone = ~(present["sar"] & present["optical"])[:, None, None]
        return {"optical": masks.optical | ~there["sar"] | alone, "sar": masks.sar | ~there["optical"] | alone}

    def _learnt(memory: Tree, ours: Views, label: Array, where: Covered, unmasked: Views, there: Covered) -> Tree:
        size = unmasked.logits[FUSED].shape[1:3]
        one_hot = (label[..., None] == jnp.arange(spec.num_classes)).astype(jnp.float32)
        shares = {head: reassignment.adaptive_avg_pool(one_hot * where[head][..., None], size) for head in HEADS}
        memory = reassignment.remembered(memory, ours.embeddings, shares, jnp.sum(one_hot, (0, 1, 2)), options.momentum)
        probabilities = {head: jax.nn.softmax(unmasked.logits[head]) for head in HEADS}
        masses = {head: reassignment.cell_mass(there[head], size) for head in HEADS}
        return reassignment.queued(memory, probabilities, masses)

    def _pseudo(found: Views, there: Covered, memory: Tree) -> dict[str, Pseudo]:
        return {
            head: reassignment.pseudo_labels(
                found.logits[head], found.embeddings[head], there[head], memory, head, options
            )
            for head in HEADS
        }

    def inferred(params: Tree, stats: Tree, batch: Batch) -> tuple[Views, Covered]:
        """What all heads see in inference, and where."""
        there = covered(batch)
        present = present_in(there)
        image = network_inputs(batch, inputs, spec, statistics)
        found = network.apply({"params": params, "batch_stats": stats}, image, False, present, method="views")
        return found, there | {FUSED: covered_by_any(there, present)}

    def pseudo(params: Tree, stats: Tree, memory: Tree, batch: Batch) -> dict[str, Pseudo]:
        return _pseudo(*inferred(params, stats, batch), memory)

    def encode(params: Tree, stats: Tree, images: jax.Array, train: bool):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return network.apply(variables, images, False, method="encode")
        return network.apply(variables, images, True, method="encode", mutable=["batch_stats"])[0]

    def forward(params: Tree, stats: Tree, batch: Batch) -> Prediction:
        found, there = inferred(params, stats, batch)
        logits = resized(found.logits[FUSED], there[FUSED].shape[1:])
        return Prediction(logits, None, found.features, found.features, found.embeddings[FUSED])

    def of_one(sensor: str):
        def predict(params: Tree, stats: Tree, batch: Batch) -> jax.Array:
            image = network_inputs(batch, alone[sensor], spec, statistics)
            branch = getattr(network, sensor)
            variables = {"params": params[sensor], "batch_stats": stats[sensor]}
            return branch.apply(variables, image, False).logits

        return predict

    def classify(params: Tree, stats: Tree, embedding: jax.Array, size: tuple[int, int]) -> jax.Array:
        return network.apply({"params": params, "batch_stats": stats}, embedding, size, method="classify")

    requires = {m: (m, f"{m}_valid") for m in SENSORS}
    both = tuple(k for m in inputs.modalities for k in requires[m])
    look = network.context.grown(inputs.local_mean // 2)
    heads = {FUSED: Head(both, lambda p, s, b: forward(p, s, b).logits, look)}
    heads |= {m: Head(requires[m], of_one(m), look) for m in SENSORS}
    streams = {"labelled": Stream("labelled")}
    if learns:
        streams[UNLABELLED] = Stream("unlabelled", float(options.unlabelled))
    couples = ("batch-norm", *(("Dice",) if options.dice else ()), *(("transport",) if assigns else ()))
    return Method(
        streams=streams,
        init=init,
        loss=loss,
        encode=encode,
        heads=heads,
        requires=(*both, "label"),
        forward=forward,
        classify=classify,
        pseudo=pseudo if assigns else None,
        couples=couples,
        limits={
            "transport_error": (
                LARGEST_ERROR,
                "the classes' masses after Sinkhorn are that far from what was asked for, summed over classes; more "
                "method.iterations or a larger method.prototype_epsilon bring it down.",
            )
        }
        if assigns
        else {},
    )


def _check(options: LabelReassignment, context: Context) -> None:
    """UserError for what does not go together."""
    experiment = context.experiment
    if not isinstance(experiment.network, DLLR):
        raise UserError(f"method 'dllr' trains network 'dllr', not {experiment.network.NAME!r}.")
    if set(experiment.inputs.modalities) != set(SENSORS):
        raise UserError(
            f"method 'dllr' reads optical and sar, not {', '.join(experiment.inputs.modalities) or 'nothing'}; "
            "--inputs.modalities sar optical is accepted."
        )
    if experiment.inputs.repeat:
        raise UserError(
            "inputs.repeat would mix the sensors' channels, which method 'dllr' keeps apart; 0 is accepted."
        )
    if options.mask_optical + options.mask_sar > 1:
        raise UserError(
            f"method.mask_optical {options.mask_optical} and method.mask_sar {options.mask_sar} would hide some cells "
            "from both sensors; shares that add up to 1 at most are accepted."
        )
