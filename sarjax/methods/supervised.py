"""Supervised segmentation: one network, cross-entropy, optionally Dice and an auxiliary head."""

import jax
import jax.numpy as jnp

from sarjax.augment.geometry import geometry
from sarjax.augment.inputs import channel_count, network_inputs
from sarjax.augment.radiometry import radiometry
from sarjax.errors import UserError
from sarjax.losses.pixel import class_weights_from_histogram, cross_entropy, dice_loss
from sarjax.methods.record import Batch, Context, Head, Method, Outputs, Rest, Term, Tree, Variables
from sarjax.models import build_network
from sarjax.options import Supervised
from sarjax.spec import IGNORE_LABEL, DatasetSpec, Statistics, Stream

SIZE_AT_INIT = 64  # parameters do not depend on it; large enough for every pooling window


def supervised(options: Supervised, context: Context) -> Method:
    """Learns `label` from `experiment.inputs`, on the labelled tiles alone."""
    experiment, spec, statistics = context.experiment, context.spec, context.statistics
    inputs, augment = experiment.inputs, experiment.augment
    network = build_network(experiment.network, spec.num_classes, jnp.dtype(experiment.precision))
    channels = channel_count(inputs, spec)
    weights = class_weights(options, spec, statistics)

    def init(key: jax.Array) -> Variables:
        image = jnp.zeros((1, SIZE_AT_INIT, SIZE_AT_INIT, channels), jnp.float32)
        variables = network.init(key, image, train=False)
        return Variables(variables["params"], variables.get("batch_stats", {}), {})

    def loss(params: Tree, rest: Rest, batch: Tree, key: jax.Array, step: jax.Array):
        where, how = jax.random.split(key)
        rows = radiometry(geometry(batch["labelled"], where, augment), how, augment, spec)
        image = network_inputs(rows, inputs, spec, statistics)
        prediction, updates = network.apply(
            {"params": params, "batch_stats": rest.stats}, image, train=True, mutable=["batch_stats"]
        )
        label = rows["label"]
        terms = {
            "cross_entropy": Term(
                *cross_entropy(prediction.logits, label, class_weights=weights, label_smoothing=options.label_smoothing)
            )
        }
        if options.dice:
            terms["dice"] = Term(*dice_loss(prediction.logits, label), options.dice)
        if options.auxiliary:
            if prediction.auxiliary is None:
                raise UserError(f"network {experiment.network.NAME!r} has no auxiliary head; method.auxiliary 0 fits.")
            terms["auxiliary"] = Term(
                *cross_entropy(
                    prediction.auxiliary, label, class_weights=weights, label_smoothing=options.label_smoothing
                ),
                options.auxiliary,
            )
        valid = label != IGNORE_LABEL
        hit = valid & (jnp.argmax(prediction.logits, -1) == label)
        metrics = {"pixel_accuracy": Term(hit.sum().astype(jnp.float32), valid.sum().astype(jnp.float32))}
        return terms, Outputs(updates.get("batch_stats", {}), rest.memory, metrics)

    def encode(params: Tree, stats: Tree, images: jax.Array, train: bool):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return network.apply(variables, images, train=False, method="encode")
        features, _ = network.apply(variables, images, train=True, method="encode", mutable=["batch_stats"])
        return features

    def predict(params: Tree, stats: Tree, batch: Batch) -> jax.Array:
        image = network_inputs(batch, inputs, spec, statistics)
        return network.apply({"params": params, "batch_stats": stats}, image, train=False).logits

    requires = tuple(k for m in inputs.modalities for k in (m, f"{m}_valid"))
    return Method(
        streams={"labelled": Stream("labelled")},
        init=init,
        loss=loss,
        encode=encode,
        heads={"main": Head(requires, predict, network.context.grown(inputs.local_mean // 2))},
        requires=(*requires, "label"),
        couples=("batch-norm", "Dice") if options.dice else ("batch-norm",),
    )


def class_weights(options: Supervised, spec: DatasetSpec, statistics: Statistics) -> jax.Array | None:
    """The weight of each class in the cross-entropy, as the options say; UserError where their number is wrong."""
    if options.class_weights == "none":
        return None
    if options.class_weights == "histogram":
        return class_weights_from_histogram(jnp.asarray(statistics.class_pixels))
    if len(options.class_weight_values) != spec.num_classes:
        raise UserError(
            f"method.class_weight_values has {len(options.class_weight_values)} values; data set {spec.name!r} has "
            f"{spec.num_classes} classes: {', '.join(spec.class_names)}."
        )
    return jnp.asarray(options.class_weight_values, jnp.float32)
