"""DHFA-Net (Gao et al., GRSL 2023): an optical teacher, a SAR student, and what each part of the method gives.

The source is an abstract: it states the parts, no figure. Networks, weights and training are ours.
"""

from collections.abc import Callable
from typing import Any

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import DHFA, Distillation, MethodOptions, Supervised

FEW = 1 / 8  # of the training tiles are labelled
DICE = 1.0
# Distillation with every part off: each recipe says what it turns on.
NOTHING: dict[str, float] = {"features": 0.0, "head": 0.0, "logits": 0.0}


def _config(modalities: tuple[str, ...], method: MethodOptions, *, few: bool = False, **network: Any) -> Config:
    return Config(
        experiment=Experiment(
            data=Data("whu_opt_sar", labelled=FEW if few else 1.0),
            inputs=Inputs(modalities=modalities),
            network=DHFA(**network),
            method=method,
            augment=Augment(flip=True, rotate=True),
            optimizer=Optimizer(name="adamw", learning_rate=1e-3, weight_decay=1e-2, schedule="cosine"),
            batch_size=16,
            epochs=40 / FEW if few else 40,
        )
    )


def _student(*, few: bool = False, network: dict[str, Any] | None = None, **parts: Any) -> Config:
    method = Distillation(**{"dice": DICE, "pairs": 1 if few else 0} | parts)
    return _config(("sar",), method, few=few, **(network or {}))


def dhfa_teacher() -> Config:
    """The teacher: sees optical images, and is a student's `--teacher` once it is trained.

    sarjax data build whu_opt_sar --source WHU-OPT-SAR
    sarjax train dhfa_teacher --workdir runs/teacher
    """
    return _config(("optical",), Supervised(dice=DICE))


def dhfa_teacher_both() -> Config:
    """A teacher that sees optical and SAR images.

    sarjax train dhfa_teacher_both --workdir runs/teacher_both
    """
    return _config(("sar", "optical"), Supervised(dice=DICE))


def dhfa_alone() -> Config:
    """The student without a teacher: SAR alone, same network, labels and steps.

    sarjax train dhfa_alone --workdir runs/alone
    """
    return _config(("sar",), Supervised(dice=DICE))


def dhfa_student() -> Config:
    """DHFA-Net: a SAR student of `dhfa_teacher`, by features, the teacher's classifier and its logits.

    sarjax train dhfa_student --teacher runs/teacher --workdir runs/student
    sarjax predict runs/student SAR.tif --out maps
    """
    return _student()


def dhfa_logits() -> Config:
    """`dhfa_student` with logit distillation alone.

    sarjax train dhfa_logits --teacher runs/teacher --workdir runs/logits
    """
    return _student(**NOTHING | {"logits": 1.0})


def dhfa_direct() -> Config:
    """`dhfa_student` with feature distillation alone, the features themselves compared.

    sarjax train dhfa_direct --teacher runs/teacher --workdir runs/direct
    """
    return _student(**NOTHING | {"features": 1.0})


def dhfa_hallucinate() -> Config:
    """`dhfa_direct`, what a small network makes of the features compared.

    sarjax train dhfa_hallucinate --teacher runs/teacher --workdir runs/hallucinate
    """
    return _student(**NOTHING | {"features": 1.0}, reading="hallucinate")


def dhfa_fuse() -> Config:
    """`dhfa_direct`, the small networks being part of the student, which fuses what they make.

    sarjax train dhfa_fuse --teacher runs/teacher --workdir runs/fuse
    """
    return _student(**NOTHING | {"features": 1.0}, network={"fuse": True})


def dhfa_head() -> Config:
    """`dhfa_direct` with supervision by the teacher's frozen classifier.

    sarjax train dhfa_head --teacher runs/teacher --workdir runs/head
    """
    return _student(**NOTHING | {"features": 1.0, "head": 0.4})


def dhfa_teacher_plain() -> Config:
    """`dhfa_teacher` without feature alignment (HFAM): a plain feature pyramid.

    sarjax train dhfa_teacher_plain --workdir runs/teacher_plain
    """
    return _config(("optical",), Supervised(dice=DICE), alignment="none")


def dhfa_alone_plain() -> Config:
    """`dhfa_alone` without feature alignment.

    sarjax train dhfa_alone_plain --workdir runs/alone_plain
    """
    return _config(("sar",), Supervised(dice=DICE), alignment="none")


def dhfa_student_plain() -> Config:
    """`dhfa_student` without feature alignment in either.

    sarjax train dhfa_student_plain --teacher runs/teacher_plain --workdir runs/student_plain
    """
    return _student(network={"alignment": "none"})


def dhfa_few_teacher() -> Config:
    """`dhfa_teacher` on an eighth of the labels, as many steps.

    sarjax train dhfa_few_teacher --workdir runs/few_teacher
    """
    return _config(("optical",), Supervised(dice=DICE), few=True)


def dhfa_few_teacher_both() -> Config:
    """`dhfa_teacher_both` on an eighth of the labels.

    sarjax train dhfa_few_teacher_both --workdir runs/few_teacher_both
    """
    return _config(("sar", "optical"), Supervised(dice=DICE), few=True)


def dhfa_few_alone() -> Config:
    """`dhfa_alone` on an eighth of the labels.

    sarjax train dhfa_few_alone --workdir runs/few_alone
    """
    return _config(("sar",), Supervised(dice=DICE), few=True)


def dhfa_few_student() -> Config:
    """Few labels, many pairs: labels on an eighth of the tiles, the teacher's signal on all.

    sarjax train dhfa_few_student --teacher runs/few_teacher --workdir runs/few_student
    """
    return _student(few=True)


def dhfa_few_hard() -> Config:
    """`dhfa_few_student` that is also supervised by the teacher's answers, with Dice, where nothing is labelled.

    sarjax train dhfa_few_hard --teacher runs/few_teacher --workdir runs/few_hard
    """
    return _student(few=True, hard=1.0)


def dhfa_few_logits() -> Config:
    """`dhfa_few_student` with logit distillation alone.

    sarjax train dhfa_few_logits --teacher runs/few_teacher --workdir runs/few_logits
    """
    return _student(few=True, **NOTHING | {"logits": 1.0})


RECIPES: tuple[Callable[[], Config], ...] = (
    dhfa_teacher,
    dhfa_teacher_both,
    dhfa_alone,
    dhfa_student,
    dhfa_logits,
    dhfa_direct,
    dhfa_hallucinate,
    dhfa_fuse,
    dhfa_head,
    dhfa_teacher_plain,
    dhfa_alone_plain,
    dhfa_student_plain,
    dhfa_few_teacher,
    dhfa_few_teacher_both,
    dhfa_few_alone,
    dhfa_few_student,
    dhfa_few_hard,
    dhfa_few_logits,
)
