"""Supervised segmentation: one network, cross-entropy, optionally Dice and an auxiliary head."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sarjax.augment.geometry import geometry
from sarjax.augment.inputs import channel_count, network_inputs
from sarjax.augment.radiometry import radiometry
from sarjax.errors import UserError
from sarjax.losses.pixel import class_weights_from_histogram, cross_entropy, dice_loss
from sarjax.methods.record import Batch, Context, Head, Method, Outputs, Rest, Term, Tree, Variables
from sarjax.models import build_network
from sarjax.models.segmenters import Prediction
from sarjax.options import Supervised
from sarjax.spec import IGNORE_LABEL, DatasetSpec, Statistics, Stream

SIZE_AT_INIT = 64  # parameters do not depend on it; large enough for every pooling window


def supervised(options: Supervised, context: Context) -> Method:
    """Learns `label` from `experiment.inputs`, on the labelled tiles alone."""
    experiment, spec, statistics = context.experiment, context.spec, context.statistics
    inputs, augment = experiment.inputs, experiment.augment
    network = build_network(experiment.network, spec.num_classes, jnp.dtype(experiment.precision))
    channels = channel_count(inputs, spec)
    weights = class_weights(options, spec, statistics, experiment.data.labelled)

    def init(key: jax.Array) -> Variables:
        image = jnp.zeros((1, SIZE_AT_INIT, SIZE_AT_INIT, channels), jnp.float32)
        variables = network.init(key, image, train=False)
        return Variables(variables["params"], variables.get("batch_stats", {}), {})

    def loss(params: Tree, rest: Rest, batch: Tree, key: jax.Array, step: jax.Array):
        where, how = jax.random.split(key)
        rows = radiometry(geometry(batch["labelled"], where, augment), how, augment, spec)
        image = network_inputs(rows, inputs, spec, statistics)
        prediction, stats = trained(network, params, rest.stats, image)
        terms, metrics = supervised_terms(options, experiment.network.NAME, prediction, rows["label"], weights)
        return terms, Outputs(stats, rest.memory, metrics)

    def encode(params: Tree, stats: Tree, images: jax.Array, train: bool):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return network.apply(variables, images, train=False, method="encode")
        features, _ = network.apply(variables, images, train=True, method="encode", mutable=["batch_stats"])
        return features

    def forward(params: Tree, stats: Tree, batch: Batch) -> Prediction:
        image = network_inputs(batch, inputs, spec, statistics)
        return network.apply({"params": params, "batch_stats": stats}, image, train=False)

    def predict(params: Tree, stats: Tree, batch: Batch) -> jax.Array:
        return forward(params, stats, batch).logits

    def classify(params: Tree, stats: Tree, embedding: jax.Array, size: tuple[int, int]) -> jax.Array:
        return network.apply({"params": params, "batch_stats": stats}, embedding, size, method="classify")

    requires = tuple(k for m in inputs.modalities for k in (m, f"{m}_valid"))
    return Method(
        streams={"labelled": Stream("labelled")},
        init=init,
        loss=loss,
        encode=encode,
        heads={"main": Head(requires, predict, network.context.grown(inputs.local_mean // 2))},
        requires=(*requires, "label"),
        forward=forward,
        classify=classify if network.classifies else None,
        couples=("batch-norm", "Dice") if options.dice else ("batch-norm",),
    )


def trained(network: Any, params: Tree, stats: Tree, image: Float[Array, "b h w c"]) -> tuple[Prediction, Tree]:
    """The network's prediction under the batch's statistics, and the next running ones."""
    variables = {"params": params, "batch_stats": stats}
    prediction, updates = network.apply(variables, image, train=True, mutable=["batch_stats"])
    return prediction, updates.get("batch_stats", {})


def supervised_terms(
    options: Supervised, network: str, prediction: Prediction, label: Int[Array, "b h w"], weights: Array | None
) -> tuple[dict[str, Term], dict[str, Term]]:
    """The terms of plain supervision and their metrics; pixels labelled 255 count in none.

    UserError that names `network` where an auxiliary head is asked for that it does not have.
    """
    how = {"class_weights": weights, "label_smoothing": options.label_smoothing}
    terms = {"cross_entropy": Term(*cross_entropy(prediction.logits, label, **how))}
    if options.dice:
        terms["dice"] = Term(*dice_loss(prediction.logits, label), options.dice)
    if options.auxiliary:
        if prediction.auxiliary is None:
            raise UserError(f"network {network!r} has no auxiliary head; method.auxiliary 0 fits.")
        terms["auxiliary"] = Term(*cross_entropy(prediction.auxiliary, label, **how), options.auxiliary)
    valid = label != IGNORE_LABEL
    hit = valid & (jnp.argmax(prediction.logits, -1) == label)
    return terms, {"pixel_accuracy": Term(hit.sum().astype(jnp.float32), valid.sum().astype(jnp.float32))}


def class_weights(options: Supervised, spec: DatasetSpec, statistics: Statistics, labelled: float) -> jax.Array | None:
    """The weight of each class in the cross-entropy, as the options say.

    labelled: share of the training tiles whose labels may be used. UserError where the number of weights is wrong, or
    where they would come from labels that may not be used.
    """
    if options.class_weights == "none":
        return None
    if options.class_weights == "histogram" and labelled < 1:
        raise UserError(
            "method.class_weights 'histogram' counts the labels of all training tiles, of which only "
            f"experiment.data.labelled = {labelled} may be used; 'none' and 'given' are accepted."
        )
    if options.class_weights == "histogram":
        return class_weights_from_histogram(jnp.asarray(statistics.class_pixels))
    if len(options.class_weight_values) != spec.num_classes:
        raise UserError(
            f"method.class_weight_values has {len(options.class_weight_values)} values; data set {spec.name!r} has "
            f"{spec.num_classes} classes: {', '.join(spec.class_names)}."
        )
    return jnp.asarray(options.class_weight_values, jnp.float32)
