"""DLLR (Han et al.): optical and SAR images, few labels, and what each part of the method gives.

The source is an abstract: it states the parts, no figure and no share of labels. Networks, weights and training are
ours.
"""

from collections.abc import Callable
from typing import Any

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import DLLR, LabelReassignment

SHARE = 1 / 16  # of the training tiles are labelled
EPOCHS = 40
# The method with every part off: each recipe says what it turns on.
NOTHING: dict[str, Any] = {
    "cell": 0,
    "complementary": 0.0,
    "cross": 0.0,
    "consistency": 0.0,
    "prediction": False,
    "prototype": False,
}
# Where labels are few, pseudo-labels are often wrong, most of all at first and where a network is not sure.
CAREFUL: dict[str, Any] = {"threshold": 0.95, "ramp": 1.0}
CROSS = NOTHING | CAREFUL | {"cross": 1.0}


def _config(share: float = SHARE, **parts: Any) -> Config:
    return Config(
        experiment=Experiment(
            data=Data("whu_opt_sar", labelled=share),
            inputs=Inputs(modalities=("sar", "optical")),
            network=DLLR(),
            method=LabelReassignment(**{"dice": 1.0} | parts),
            augment=Augment(flip=True, rotate=True),
            optimizer=Optimizer(name="adamw", learning_rate=1e-3, weight_decay=1e-2, schedule="cosine"),
            batch_size=16,
            epochs=EPOCHS / share,
        )
    )


def dllr() -> Config:
    """DLLR: masks, complementary learning, labels reassigned by two levels of transport, cross supervision.

    An epoch is one of the labelled tiles: with another share S of them (--data.labelled), --epochs 40/S keeps the
    number of steps.

    sarjax train dllr --workdir runs/dllr
    sarjax predict runs/dllr SAR.tif --head sar --out maps
    """
    return _config(**CAREFUL)


def dllr_supervised() -> Config:
    """`dllr` from its labelled tiles alone, as many steps.

    sarjax train dllr_supervised --workdir runs/supervised
    """
    return _config(unlabelled=0, **NOTHING)


def dllr_all_labels() -> Config:
    """`dllr_supervised` with all tiles labelled: what labels would give.

    sarjax train dllr_all_labels --workdir runs/all_labels
    """
    return _config(1.0, unlabelled=0, **NOTHING)


def dllr_cps() -> Config:
    """Cross pseudo-supervision alone: each sensor by the other's likeliest classes.

    sarjax train dllr_cps --workdir runs/cps
    """
    return _config(**CROSS)


def dllr_prediction() -> Config:
    """`dllr_cps` with labels reassigned by the prediction level.

    sarjax train dllr_prediction --workdir runs/prediction
    """
    return _config(**CROSS | {"prediction": True})


def dllr_prototype() -> Config:
    """`dllr_cps` with labels reassigned by the prototype level.

    sarjax train dllr_prototype --workdir runs/prototype
    """
    return _config(**CROSS | {"prototype": True})


def dllr_region() -> Config:
    """`dllr_cps` with labels reassigned by the region level.

    sarjax train dllr_region --workdir runs/region
    """
    return _config(**CROSS | {"region": True})


def dllr_levels() -> Config:
    """`dllr_cps` with labels reassigned where the prediction and the prototype level agree.

    sarjax train dllr_levels --workdir runs/levels
    """
    return _config(**CROSS | {"prediction": True, "prototype": True})


def dllr_unmasked() -> Config:
    """`dllr` without asymmetric masking.

    sarjax train dllr_unmasked --workdir runs/unmasked
    """
    return _config(**CAREFUL | {"cell": 0})


def dllr_uncomplementary() -> Config:
    """`dllr` without difference-guided complementary learning.

    sarjax train dllr_uncomplementary --workdir runs/uncomplementary
    """
    return _config(**CAREFUL | {"complementary": 0.0})


def dllr_likeliest() -> Config:
    """`dllr` whose pseudo-labels are the likeliest classes, without transport.

    sarjax train dllr_likeliest --workdir runs/likeliest
    """
    return _config(**CAREFUL | {"prediction": False, "prototype": False})


def dllr_uncrossed() -> Config:
    """`dllr` without cross pseudo-supervision between the sensors.

    sarjax train dllr_uncrossed --workdir runs/uncrossed
    """
    return _config(**CAREFUL | {"cross": 0.0})


def dllr_inconsistent() -> Config:
    """`dllr` without the fused head's supervision of the others (multimodal consistency).

    sarjax train dllr_inconsistent --workdir runs/inconsistent
    """
    return _config(**CAREFUL | {"consistency": 0.0})


def dllr_credulous() -> Config:
    """`dllr` that believes every pseudo-label, from a fifth of the training on.

    sarjax train dllr_credulous --workdir runs/credulous
    """
    return _config()


def dllr_hard() -> Config:
    """`dllr` whose classes get exactly the expected mass.

    sarjax train dllr_hard --workdir runs/hard
    """
    return _config(**CAREFUL | {"mass": "hard"})


RECIPES: tuple[Callable[[], Config], ...] = (
    dllr,
    dllr_supervised,
    dllr_all_labels,
    dllr_cps,
    dllr_prediction,
    dllr_prototype,
    dllr_region,
    dllr_levels,
    dllr_unmasked,
    dllr_uncomplementary,
    dllr_likeliest,
    dllr_uncrossed,
    dllr_inconsistent,
    dllr_credulous,
    dllr_hard,
)
