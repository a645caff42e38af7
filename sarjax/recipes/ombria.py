"""Flood mapping on OMBRIA: LANet-R18 from Sentinel-1 or Sentinel-2, both dates stacked on channels.

Published by others (compact U-Net, all 624 training tiles): flood IoU .5071 from S1, .6147 from S2.
"""

import dataclasses

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import LANet, Supervised

S1 = Inputs(modalities=("sar",), normalisation="tile", local_mean=7, date_difference=True)


def ombria_s1() -> Config:
    """Sentinel-1, stretched image by image: each standardised by itself, with local means and their difference.

    sarjax data build ombria --source OMBRIA
    sarjax train ombria_s1 --workdir runs/ombria_s1
    """
    return Config(
        experiment=Experiment(
            data=Data("ombria"),
            inputs=S1,
            network=LANet(),
            method=Supervised(dice=1.0),
            augment=Augment(flip=True, rotate=True),
            optimizer=Optimizer(name="adamw", learning_rate=2e-3, weight_decay=1e-2, schedule="cosine"),
            batch_size=8,
            epochs=120,
        )
    )


def ombria_s1_plain() -> Config:
    """Sentinel-1 as it is stored, by the statistics of the training split, cross-entropy alone: the floor.

    sarjax train ombria_s1_plain --workdir runs/ombria_s1_plain
    """
    experiment = ombria_s1().experiment
    return Config(
        experiment=dataclasses.replace(experiment, inputs=Inputs(modalities=("sar",)), method=Supervised(dice=0.0))
    )


def ombria_s2() -> Config:
    """Sentinel-2 (SWIR, NIR, green).

    sarjax train ombria_s2 --workdir runs/ombria_s2
    """
    experiment = ombria_s1().experiment
    return Config(experiment=dataclasses.replace(experiment, inputs=Inputs(modalities=("optical",))))


RECIPES = (ombria_s1, ombria_s1_plain, ombria_s2)
