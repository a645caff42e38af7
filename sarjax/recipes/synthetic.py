"""The embedded synthetic scenes: small runs that finish in minutes on two cores."""

import dataclasses

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import LANet, Supervised


def synthetic_sar() -> Config:
    """A quarter-width LANet-R18 on synthetic SAR: the main job of `sarjax demo`.

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


RECIPES = (synthetic_sar, synthetic_optical)
