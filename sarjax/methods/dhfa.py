"""DHFA-Net (Gao et al., GRSL 2023): a student that sees SAR alone learns from a frozen teacher that saw optical images.

The paper's abstract states a pretrained teacher, an identical student, feature distillation (HFDM) and supervision by
it; layers, losses and weights are ours. Any network teaches any other: both are seen through `Prediction`, and levels
of the same stride are compared.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.augment.inputs import network_inputs
from sarjax.config import Augment
from sarjax.errors import UserError
from sarjax.losses.distillation import channel_wise_distillation, feature_loss, logit_distillation
from sarjax.losses.pixel import cross_entropy, dice_loss
from sarjax.methods import lessons, streams
from sarjax.methods.record import Batch, Context, Method, Outputs, Rest, Teacher, Term, Tree, Variables
from sarjax.methods.scene_clustering import blank, with_scene_clustering
from sarjax.methods.supervised import class_weights, supervised, supervised_terms, trained
from sarjax.models import build_network
from sarjax.models.dhfa import Hallucination
from sarjax.models.layers import conv, kaiming_fan_in
from sarjax.models.resampling import adaptive_avg_pool, resize_bilinear
from sarjax.models.segmenters import Prediction
from sarjax.options import Distillation
from sarjax.spec import IGNORE_LABEL, DatasetSpec, Stream

NAME = "hfdm"  # of what is trained beside the student, in params and stats
EMBEDDING = "embedding"
PAIRS = "pairs"  # the stream of unlabelled rows
ROLE = 0xD15711  # folded into keys

Levels = dict[str, Float[Array, "b _ _ _"]]


class Projections(nn.Module):
    """The student's features as its teacher's: a projection per level, none where the channels are the teacher's.

    channels: of the teacher, by level. reading: "hallucinate" projects every level by a `Hallucination`; else a 1x1
    convolution projects those whose channels differ.
    """

    channels: dict[str, int]
    reading: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: Levels, train: bool) -> Levels:
        out = {}
        for name, x in levels.items():
            if self.reading == "hallucinate":
                x = Hallucination(self.channels[name], dtype=self.dtype, name=name)(x, train)
            elif x.shape[-1] != self.channels[name]:
                x = conv(self.channels[name], bias=True, init=kaiming_fan_in, dtype=self.dtype, name=name)(x)
            out[name] = x
        return out


def dhfa(options: Distillation, context: Context) -> Method:
    """The student's method; its heads are those of `supervised`, and need neither the teacher nor its sensors.

    Objective: plain supervision on labelled pixels + options.features L_hfd + options.head L_sup + options.logits L_kd
    + options.hard L_hard. Teacher and student see the same geometry; radiometry is the student's alone. The teacher
    counts where all sensors and dates that it reads have data.
    """
    experiment, spec, statistics, teacher = context.experiment, context.spec, context.statistics, context.teacher
    base = supervised(options, context)
    network = build_network(experiment.network, spec.num_classes, jnp.dtype(experiment.precision))
    weights = class_weights(options, spec, statistics, experiment.data.labelled)

    def projections(taught: Levels) -> Projections:
        return Projections({name: x.shape[-1] for name, x in taught.items()}, options.reading, network.dtype)

    def compared(ours: Prediction, theirs: Prediction) -> tuple[Levels, Levels]:
        """Of `common`, what a term reads."""
        mine, taught = common(ours, theirs)
        read = [n for n in mine if options.features or (options.head and n == EMBEDDING)]
        return {n: mine[n] for n in read}, {n: taught[n] for n in read}

    def init(key: jax.Array) -> Variables:
        """Without a teacher, as for inference, there is nothing to project."""
        # The student's own draws stay what they are without a teacher, so that runs of one seed can be compared.
        variables = base.init(key)
        if teacher is None:
            return variables
        rows = jax.eval_shape(lambda: blank(spec))
        frozen = jax.eval_shape(teacher.method.init, key)
        ours = jax.eval_shape(lambda v, r: base.forward(v.params, v.stats, r), variables, rows)
        theirs = jax.eval_shape(lambda v, r: teacher.method.forward(v.params, v.stats, r), frozen, rows)
        mine, taught = compared(ours, theirs)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), mine)
        made = projections(taught).init(jax.random.fold_in(key, ROLE), empty, False)
        params, stats = ({NAME: made[kind]} if kind in made else {} for kind in ("params", "batch_stats"))
        return Variables({**variables.params, **params}, {**variables.stats, **stats}, variables.memory)

    def project(params: Tree, stats: Tree, levels: Levels, taught: Levels) -> tuple[Levels, Tree]:
        variables = {"params": params.get(NAME, {}), "batch_stats": stats.get(NAME, {})}
        out, updates = projections(taught).apply(variables, levels, True, mutable=["batch_stats"])
        return out, {NAME: updates["batch_stats"]} if NAME in stats else {}

    def loss(params: Tree, rest: Rest, batch: Tree, key: jax.Array, step: jax.Array):
        rows, seen = augmented(batch, key, experiment.augment, spec)
        label = rows["label"]
        image = network_inputs(seen, experiment.inputs, spec, statistics)
        prediction, stats = trained(network, params, rest.stats, image)
        terms, metrics = supervised_terms(options, experiment.network.NAME, prediction, label, weights)

        frozen = rest.frozen
        said = lessons.lesson(teacher, frozen, rows)
        lesson, answer, where = said
        # Without either filter the weights are those of the data alone: no teacher is run to add them up.
        if options.confidence:
            where &= jnp.max(jax.nn.softmax(lesson.logits), -1) >= options.confidence
        if options.right:
            where &= (label == IGNORE_LABEL) | (label == answer)
        metrics |= lessons.metrics(prediction, said, where, label)
        where = where.astype(jnp.float32)

        mine, taught = compared(prediction, lesson)
        projected, moved = project(params, rest.stats, mine, taught)
        if options.features:
            for name, x in projected.items():
                size = x.shape[1:3]
                target = taught[name] if taught[name].shape[1:3] == size else resize_bilinear(taught[name], size)
                cells = adaptive_avg_pool(where[..., None], size)[..., 0]
                pair = feature_loss(x, target, cells, kind=options.feature_loss)
                terms[f"features_{name}"] = Term(*pair, options.features / len(projected))
        if options.head:
            scores = teacher.method.classify(frozen.params, frozen.stats, projected[EMBEDDING], label.shape[1:3])
            known = jnp.where(where > 0, label, IGNORE_LABEL)
            terms["head"] = Term(*cross_entropy(scores, known, class_weights=weights), options.head)
        if options.logits:
            distil = logit_distillation if options.logit_loss == "pixel" else channel_wise_distillation
            pair = distil(prediction.logits, lesson.logits, where, temperature=options.temperature)
            terms["logits"] = Term(*pair, options.logits)
        if options.hard:
            target = jnp.where((label == IGNORE_LABEL) & (where > 0), answer, IGNORE_LABEL)
            terms["hard"] = Term(*cross_entropy(prediction.logits, target, class_weights=weights), options.hard)
            if options.dice:
                terms["hard_dice"] = Term(*dice_loss(prediction.logits, target), options.hard * options.dice)
        return terms, Outputs({**stats, **moved}, rest.memory, metrics)

    drawn = dict(base.streams)
    if options.pairs:
        drawn[PAIRS] = Stream("unlabelled", float(options.pairs))
    method = base._replace(
        init=init,
        loss=loss,
        streams=drawn,
        requires=lessons.requires(base, teacher),
        teacher=lambda teacher: fits(teacher, options, spec),
        beside=(NAME,),
    )
    return with_scene_clustering(method, options.clustering, context)


def augmented(batch: Tree, key: jax.Array, options: Augment, spec: DatasetSpec) -> tuple[Batch, Batch]:
    """The rows of a batch as the teacher sees them, after geometry, and as the student does, after radiometry too.

    Labelled rows are what `supervised` makes of them by the same key; each is followed by its unlabelled ones.
    """
    pairs = [
        streams.augmented(batch[stream], key, options, spec, role)
        for stream, role in (("labelled", None), (PAIRS, ROLE))
        if stream in batch
    ]
    taught, seen = zip(*pairs, strict=True)
    return streams.merged(taught), streams.merged(seen)


def common(student: Prediction, teacher: Prediction) -> tuple[Levels, Levels]:
    """What both have at the same stride, by name, and their embeddings.

    UserError where they share no stride.
    """
    strides = [s for s in student.pyramid if s in teacher.pyramid]
    if not strides:
        raise UserError(
            f"the student has features at strides {sorted(student.pyramid)} and its teacher at "
            f"{sorted(teacher.pyramid)}: networks with a common stride are accepted."
        )
    names = [f"stride_{s}" for s in strides]
    mine, theirs = (
        dict(zip(names, (p.pyramid[s] for s in strides), strict=True)) | {EMBEDDING: p.embedding}
        for p in (student, teacher)
    )
    return mine, theirs


def fits(teacher: Teacher, options: Distillation, spec: DatasetSpec) -> None:
    """UserError that names what of `teacher` does not fit the data of its student, or what is asked of it."""
    lessons.fits(teacher, spec)
    if options.head and teacher.method.classify is None:
        raise UserError(
            f"the teacher's network {teacher.experiment.network.NAME!r} has no single classifier that could read the "
            "student's features; method.head 0 fits."
        )
