"""Cheng et al., "A semantic segmentation method for SAR image with assistance of self-supervised scene
classification": the rows of its tables on WHU-OPT-SAR."""

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import FCN, LANet, Supervised


def cheng_lanet() -> Config:
    """Table 1, LANet (= Table 3, no auxiliary task): SAR repeated to three channels, 256x256 tiles, batch 32.

    The paper states the network, the tile size and the batch; optimizer and length are LANet's own (SGD .1, poly 1.5,
    50 epochs), and the split by scene is ours: the paper does not state one.

        sarjax data build whu_opt_sar --source WHU-OPT-SAR
        sarjax train cheng_lanet --workdir runs/cheng_lanet
    """
    return Config(
        experiment=Experiment(
            data=Data("whu_opt_sar"),
            inputs=Inputs(modalities=("sar",), repeat=3),
            network=LANet(),
            method=Supervised(),
            augment=Augment(flip=True, rotate=True),
            optimizer=Optimizer(name="sgd", learning_rate=0.1, schedule="poly", power=1.5, weight_decay=5e-4),
            batch_size=32,
            epochs=50,
        )
    )


def whu_fcn() -> Config:
    """A plain FCN head on the whole ResNet-18, as a floor; no row of the paper.

    sarjax train whu_fcn --workdir runs/whu_fcn
    """
    config = cheng_lanet()
    experiment = config.experiment
    return Config(
        experiment=Experiment(
            data=experiment.data,
            inputs=experiment.inputs,
            network=FCN(),
            augment=experiment.augment,
            optimizer=experiment.optimizer,
            batch_size=experiment.batch_size,
            epochs=experiment.epochs,
        )
    )


RECIPES = (cheng_lanet, whu_fcn)
