"""FRD (Wang et al., TAES 2025): a change-detection network small enough for a satellite learns a large one's relations.

The source is an abstract: it states what is distilled, no formula and no figure; `sarjax.losses.relational` is our
reading of it. Relations have no channels, so student and teacher may be of any width, depth and stride.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sarjax.augment.inputs import dates_of, has_data, network_inputs
from sarjax.errors import UserError
from sarjax.losses import relational
from sarjax.losses.distillation import logit_distillation
from sarjax.methods import lessons, streams
from sarjax.methods.record import Context, Method, Outputs, Rest, Teacher, Term, Tree
from sarjax.methods.supervised import class_weights, supervised, supervised_terms, trained
from sarjax.models import build_network
from sarjax.models.resampling import adaptive_avg_pool, resize_bilinear
from sarjax.options import RelationalDistillation
from sarjax.spec import IGNORE_LABEL

ROLE = 0xF4D  # folded into keys

ByDate = dict[int, Float[Array, "b 2 _ _ c"]]


def frd(options: RelationalDistillation, context: Context) -> Method:
    """The student's method; its heads are those of `supervised`, and need no teacher.

    Objective: plain supervision + bfdd_pixel L_pix + bfdd_category L_cat + ccrd_pixel L_pixel + ccrd_cluster L_cluster
    + logits L_kd by the weights of `options`, the first four being means over the student's stages. A stage is compared
    with the teacher's of the nearest stride, resized to its grid. Relations are those of labelled pixels at which
    student and teacher have all of their data, over the global batch.
    UserError where the network does not compare dates.
    """
    experiment, spec, statistics, teacher = context.experiment, context.spec, context.statistics, context.teacher
    base = supervised(options, context)
    network = build_network(experiment.network, spec.num_classes, jnp.dtype(experiment.precision))
    if experiment.network.DATES == 1:
        raise UserError(
            f"method 'frd' needs a network that compares dates, not {experiment.network.NAME!r}: change and "
            "fc_siam_diff are accepted."
        )
    weights = class_weights(options, spec, statistics, experiment.data.labelled)
    related = options.bfdd_pixel or options.bfdd_category or options.ccrd_pixel or options.ccrd_cluster

    def loss(params: Tree, rest: Rest, batch: Tree, key: jax.Array, step: jax.Array):
        rows, seen = streams.augmented(batch["labelled"], key, experiment.augment, spec)
        label = rows["label"]
        image = network_inputs(seen, experiment.inputs, spec, statistics)
        prediction, stats = trained(network, params, rest.stats, image)
        terms, metrics = supervised_terms(options, experiment.network.NAME, prediction, label, weights)

        said = lessons.lesson(teacher, rest.frozen, rows)
        metrics |= lessons.metrics(prediction, said, said.seen, label)
        # A relation between dates needs both of them, in the student too.
        related_at = said.seen & has_data(rows, experiment.inputs, spec)
        if options.logits:
            pair = logit_distillation(
                prediction.logits,
                said.prediction.logits,
                said.seen.astype(jnp.float32),
                temperature=options.temperature,
            )
            terms["logits"] = Term(*pair, options.logits)
        if related:
            # By the step's key: the same draw for both dates and all rows, another one in each step and stage.
            draws = jax.random.fold_in(key, ROLE)
            cells = partial(label_cells, label, related_at, spec.num_classes)
            terms |= relations(options, prediction.by_date, said.prediction.by_date, cells, draws)
        return terms, Outputs(stats, rest.memory, metrics)

    return base._replace(
        loss=loss,
        requires=lessons.requires(base, teacher),
        teacher=lambda teacher: fits(teacher, context),
        couples=(*base.couples, "relations between classes") if related else base.couples,
    )


def fits(teacher: Teacher, context: Context) -> None:
    """UserError that names what of `teacher` does not fit the data, or that it does not compare the student's dates."""
    lessons.fits(teacher, context.spec)
    network = teacher.experiment.network
    if network.DATES == 1:
        raise UserError(
            f"the teacher's network {network.NAME!r} sees all channels as one image, and has no features of each date: "
            "a network that compares dates fits."
        )
    theirs, ours = dates_of(teacher.experiment.inputs, teacher.spec), dates_of(context.experiment.inputs, context.spec)
    if theirs != ours:
        raise UserError(
            f"the teacher compares dates {theirs[0]} and {theirs[1]}, this run {ours[0]} and {ours[1]}: the same in "
            "the same order are accepted."
        )


def nearest_stages(student: ByDate, teacher: ByDate) -> dict[int, int]:
    """{stride of the student: stride of the teacher that it is compared with}: the nearest, of two the finer."""
    return {ours: min(sorted(teacher), key=lambda theirs: max(ours, theirs) / min(ours, theirs)) for ours in student}


def label_cells(
    labels: Int[Array, "b h w"], where: Bool[Array, "b h w"], num_classes: int, size: tuple[int, int]
) -> Float[Array, "b _ _ k"]:
    """Share of each class in the cells of a grid of `size` = (rows, columns), over the labelled pixels of `where`.

    A cell's shares add up to that of such pixels: a little change counts in a coarse cell by as much as there is.
    """
    seen = where & (labels != IGNORE_LABEL)
    one_hot = (labels[..., None] == jnp.arange(num_classes)) & seen[..., None]
    return adaptive_avg_pool(one_hot.astype(jnp.float32), size)


def relations(
    options: RelationalDistillation,
    student: ByDate,
    teacher: ByDate,
    cells_of: Callable[[tuple[int, int]], Float[Array, "b _ _ k"]],
    key: jax.Array,
) -> dict[str, Term]:
    """The terms of BFDD and CCRD for every stage of the student, "<part>_stride_<stride>", each with its share of the
    part's weight.

    cells_of: (rows, columns) -> the share of each class in the cells of that grid. key: of the draw of channels.
    """
    terms: dict[str, Term] = {}
    for number, (stride, theirs) in enumerate(nearest_stages(student, teacher).items()):
        ours, size = student[stride], student[stride].shape[2:4]
        taught = _resized(teacher[theirs], size)
        cells = cells_of(size)
        pairs = {}
        if options.bfdd_pixel or options.bfdd_category:
            narrow, wide = _of_one_width(options, ours, taught, jax.random.fold_in(key, number))
            if options.bfdd_pixel:
                pairs["bfdd_pixel"] = relational.pixel_distance(narrow, wide, cells, balanced=options.balanced)
            if options.bfdd_category:
                pairs["bfdd_category"] = relational.category_distance(narrow, wide, cells)
        if options.ccrd_pixel or options.ccrd_cluster:
            mine, his = (relational.difference_shares(f, cells, sharpness=options.sharpness) for f in (ours, taught))
            if options.ccrd_pixel:
                pairs["ccrd_pixel"] = relational.share_divergence(mine, his, cells)
            if options.ccrd_cluster:
                how = {"temperature": options.cluster_temperature}
                pairs["ccrd_cluster"] = relational.share_columns(mine, his, cells, **how)
        for name, pair in pairs.items():
            terms[f"{name}_stride_{stride}"] = Term(*pair, getattr(options, name) / len(student))
    return terms


def _of_one_width(
    options: RelationalDistillation, ours: Array, taught: Array, key: jax.Array
) -> tuple[Float[Array, "b 2 h w c"], Float[Array, "b 2 h w e"]]:
    """Student's and teacher's features of which as many channels are not 0, those of the narrower, or all of both."""
    if options.channels == "all":
        return ours, taught
    number = min(ours.shape[-1], taught.shape[-1])
    drawn = (
        relational.drawn_channels(jax.random.fold_in(key, i), x.shape[-1], number) for i, x in enumerate((ours, taught))
    )
    return tuple(
        x if x.shape[-1] == number else x * d.astype(x.dtype) for x, d in zip((ours, taught), drawn, strict=True)
    )


def _resized(x: Float[Array, "b 2 h w c"], size: tuple[int, int]) -> Float[Array, "b 2 _ _ c"]:
    """Both dates bilinearly, without antialiasing, at `size`."""
    if x.shape[2:4] == size:
        return x
    b, t, h, w, c = x.shape
    return resize_bilinear(x.reshape(b * t, h, w, c), size).reshape(b, t, *size, c)
