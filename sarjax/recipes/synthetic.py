"""The embedded synthetic scenes: small runs that finish in minutes on two cores."""

import dataclasses

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import DHFA, Distillation, LANet, MethodOptions, Supervised


def synthetic_sar() -> Config:
    """A quarter-width LANet-R18 on synthetic SAR.

    sarjax data synthesize --out scenes --scenes 6 --size 1024x1024 --seed 0
    sarjax data build whu_opt_sar --source scenes
    sarjax train synthetic_sar --workdir runs/synthetic_sar
    """
    return Config(
        experiment=Experiment(
            data=Data("whu_opt_sar"),
            inputs=Inputs(modalities=("sar",), local_mean=7),
            network=LANet(width=0.25),
            method=Supervised(dice=0.5),
            augment=Augment(crop=128, flip=True, rotate=True),
            optimizer=Optimizer(name="adamw", learning_rate=3e-3, schedule="cosine"),
            batch_size=8,
            epochs=60,
        )
    )


def synthetic_optical() -> Config:
    """The same from the optical image.

    sarjax train synthetic_optical --workdir runs/synthetic_optical
    """
    experiment = synthetic_sar().experiment
    return Config(experiment=dataclasses.replace(experiment, inputs=Inputs(modalities=("optical",))))


def demo_teacher() -> Config:
    """First of the three jobs of `sarjax demo`: a teacher that sees optical images, on few labels.

    sarjax data synthesize --out scenes --scenes 12 --size 1024x1024 --seed 0
    sarjax data build whu_opt_sar --source scenes
    sarjax train demo_teacher --workdir runs/teacher
    """
    return _demo(Inputs(modalities=("optical",)), Supervised(dice=0.5))


def demo_alone() -> Config:
    """Second job: a student from SAR alone, on the same few labels, without a teacher.

    sarjax train demo_alone --workdir runs/alone
    """
    return _demo(Inputs(modalities=("sar",), local_mean=7), Supervised(dice=0.5))


def demo_student() -> Config:
    """Third job: the same student, same labels, as many steps, taught by `demo_teacher` on all pairs of images.

    sarjax train demo_student --teacher runs/teacher --workdir runs/student
    """
    return _demo(Inputs(modalities=("sar",), local_mean=7), Distillation(dice=0.5, pairs=1, hard=1.0))


def _demo(inputs: Inputs, method: MethodOptions) -> Config:
    experiment = synthetic_sar().experiment
    return Config(
        experiment=dataclasses.replace(
            experiment,
            data=Data("whu_opt_sar", labelled=1 / 32),
            inputs=inputs,
            network=DHFA(width=0.25),
            method=method,
            steps=300,
        )
    )


RECIPES = (synthetic_sar, synthetic_optical, demo_teacher, demo_alone, demo_student)
