"""FRD (Wang et al., TAES 2025): a large change-detection network teaches one that is small enough for a satellite.

The source is an abstract: it states the parts, no figure. Networks, weights and training are ours. The recipes are of
LEVIR-CD (`--data.config` for another set of its family); on OMBRIA and made-up scenes they read SAR.
"""

from collections.abc import Callable
from typing import Any

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import Change, FCSiamDiff, MethodOptions, NetworkOptions, RelationalDistillation, Supervised

DICE = 1.0
SMALL, HALF = Change(width=0.25), Change(width=0.5)
# Distillation with every part off: each recipe says what it turns on.
NOTHING: dict[str, float] = dict.fromkeys(("bfdd_pixel", "bfdd_category", "ccrd_pixel", "ccrd_cluster"), 0.0)
BFDD = {"bfdd_pixel": 1.0, "bfdd_category": 1.0}
CCRD = {"ccrd_pixel": 1.0, "ccrd_cluster": 1.0}


def _config(network: NetworkOptions, method: MethodOptions) -> Config:
    return Config(
        experiment=Experiment(
            data=Data("bitemporal", "levir_cd"),
            inputs=Inputs(modalities=("optical",), by_date=True),
            network=network,
            method=method,
            augment=Augment(flip=True, rotate=True, swap_dates=True),
            optimizer=Optimizer(name="adamw", learning_rate=1e-3, weight_decay=1e-2, schedule="cosine"),
            batch_size=16,
            epochs=50,
        )
    )


def _student(network: NetworkOptions = SMALL, **parts: Any) -> Config:
    return _config(network, RelationalDistillation(dice=DICE, **NOTHING | parts))


def frd_teacher() -> Config:
    """The teacher, on ResNet-50: a student's `--teacher` once it is trained.

    sarjax data build bitemporal --config levir_cd --source LEVIR-CD
    sarjax train frd_teacher --workdir runs/teacher
    """
    return _config(Change(encoder="resnet50"), Supervised(dice=DICE))


def frd_teacher_r34() -> Config:
    """A teacher on ResNet-34.

    sarjax train frd_teacher_r34 --workdir runs/teacher_r34
    """
    return _config(Change(encoder="resnet34"), Supervised(dice=DICE))


def frd_alone() -> Config:
    """The student without a teacher: ResNet-18 of a quarter of the width.

    sarjax train frd_alone --workdir runs/alone
    """
    return _config(SMALL, Supervised(dice=DICE))


def frd_logits() -> Config:
    """`frd_alone` with logit distillation.

    sarjax train frd_logits --teacher runs/teacher --workdir runs/logits
    """
    return _student(logits=1.0)


def frd_bfdd() -> Config:
    """`frd_alone` with distances between the dates' features (BFDD).

    sarjax train frd_bfdd --teacher runs/teacher --workdir runs/bfdd
    """
    return _student(**BFDD)


def frd_ccrd() -> Config:
    """`frd_alone` with shares of change and no change in the differences (CCRD).

    sarjax train frd_ccrd --teacher runs/teacher --workdir runs/ccrd
    """
    return _student(**CCRD)


def frd() -> Config:
    """FRD: BFDD and CCRD.

    sarjax train frd --teacher runs/teacher --workdir runs/frd
    sarjax predict runs/frd --t1 BEFORE.tif --t2 AFTER.tif --out maps
    sarjax bench deploy runs/frd
    """
    return _student(**BFDD, **CCRD)


def frd_full() -> Config:
    """`frd` and logit distillation.

    sarjax train frd_full --teacher runs/teacher --workdir runs/full
    """
    return _student(**BFDD, **CCRD, logits=1.0)


def frd_half_alone() -> Config:
    """`frd_alone` of half of the width.

    sarjax train frd_half_alone --workdir runs/half_alone
    """
    return _config(HALF, Supervised(dice=DICE))


def frd_half_full() -> Config:
    """`frd_full` of half of the width.

    sarjax train frd_half_full --teacher runs/teacher --workdir runs/half_full
    """
    return _student(HALF, **BFDD, **CCRD, logits=1.0)


def frd_fc_siam_diff() -> Config:
    """FC-Siam-diff (Daudt et al.), the classical baseline.

    sarjax train frd_fc_siam_diff --workdir runs/fc_siam_diff
    """
    return _config(FCSiamDiff(), Supervised(dice=DICE))


RECIPES: tuple[Callable[[], Config], ...] = (
    frd_teacher,
    frd_teacher_r34,
    frd_alone,
    frd_logits,
    frd_bfdd,
    frd_ccrd,
    frd,
    frd_full,
    frd_half_alone,
    frd_half_full,
    frd_fc_siam_diff,
)
