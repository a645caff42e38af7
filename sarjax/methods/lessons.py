"""What methods with a frozen teacher share: whether it fits, what it says of a batch, and how well it does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sarjax.augment.inputs import has_data
from sarjax.errors import UserError
from sarjax.methods.record import Batch, Method, Teacher, Term, Variables
from sarjax.models.segmenters import Prediction
from sarjax.spec import IGNORE_LABEL, DatasetSpec


class Lesson(NamedTuple):
    """A teacher's prediction, without gradient, its most probable classes, and where it has all of its data."""

    prediction: Prediction
    answer: Int[Array, "b h w"]
    seen: Bool[Array, "b h w"]


def lesson(teacher: Teacher, frozen: Variables, rows: Batch) -> Lesson:
    """The teacher on `rows` after geometry; radiometry is the student's alone.

    Each sensor and date that it reads must have data for `seen`.
    """
    said = jax.lax.stop_gradient(teacher.method.forward(frozen.params, frozen.stats, rows))
    return Lesson(said, jnp.argmax(said.logits, -1), has_data(rows, teacher.experiment.inputs, teacher.spec))


def metrics(prediction: Prediction, taught: Lesson, where: Array, label: Array) -> dict[str, Term]:
    """How often the teacher is right on labelled pixels where it has data; how often the student agrees with it where
    it counts; where it counts.
    """

    def share(hit: Array, among: Array) -> Term:
        return Term(jnp.sum(hit & among).astype(jnp.float32), jnp.sum(among).astype(jnp.float32))

    known = label != IGNORE_LABEL
    agrees = jnp.argmax(prediction.logits, -1) == taught.answer
    return {
        "teacher_accuracy": share(taught.answer == label, taught.seen & known),
        "teacher_agreement": share(agrees, where),
        "teacher_counts": share(where, jnp.ones_like(where)),
    }


def requires(method: Method, teacher: Teacher | None) -> tuple[str, ...]:
    """What the batches of `method` must hold where `teacher` teaches it."""
    sensors = teacher.experiment.inputs.modalities if teacher is not None else ()
    return tuple(dict.fromkeys((*method.requires, *(key for m in sensors for key in (m, f"{m}_valid")))))


def fits(teacher: Teacher, spec: DatasetSpec) -> None:
    """UserError that names what of `teacher` does not fit the data of its student."""
    theirs = teacher.spec
    if theirs.class_names != spec.class_names:
        raise UserError(
            f"the teacher knows the classes {', '.join(theirs.class_names)}, data set {spec.name!r} has "
            f"{', '.join(spec.class_names)}: a teacher of the same classes is accepted."
        )
    if theirs.dates != spec.dates:
        raise UserError(
            f"the teacher was trained on {theirs.dates} date(s), data set {spec.name!r} has {spec.dates}: a teacher of "
            "as many is accepted."
        )
    for name in teacher.experiment.inputs.modalities:
        if name not in spec.modality_names:
            raise UserError(
                f"the teacher reads {name!r}, which data set {spec.name!r} does not hold: "
                f"{', '.join(spec.modality_names)}."
            )
        here, there = spec.modality(name), theirs.modality(name)
        if (here.bands, here.dtype) != (there.bands, there.dtype):
            described = [f"{', '.join(b.name for b in m.bands)} ({m.dtype})" for m in (there, here)]
            raise UserError(
                f"the teacher reads {name!r} as {described[0]}, data set {spec.name!r} holds {described[1]}: the same "
                "bands in the same type are accepted."
            )
    if teacher.method.forward is None:
        raise UserError(
            f"method {teacher.experiment.method.NAME!r} shows no features to learn from; another teacher fits."
        )
