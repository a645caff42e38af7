"""Cheng et al., "A semantic segmentation method for SAR image with assistance of self-supervised scene
classification": the rows of its tables on WHU-OPT-SAR."""

import dataclasses
from typing import Any

from sarjax.config import Augment, Config, Data, Experiment, Inputs, Optimizer
from sarjax.options import FCN, Clustering, DeepLabV3, LANet, NetworkOptions, PSPNet, SceneClustering, Supervised


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


def cheng_fcn_se() -> Config:
    """Table 1, FCN+SE: `cheng_lanet` with squeeze-and-excitation, attention from the mean of the whole image.

    The paper does not describe the network; with LANet's layers its parameters and Flops fit Table 2.

        sarjax train cheng_fcn_se --workdir runs/cheng_fcn_se
    """
    return _with(LANet(low_window=0, high_window=0))


def cheng_deeplabv3() -> Config:
    """Table 1, Deeplabv3: ResNet-50 at output stride 16, as Table 2 counts it; the rest as `cheng_lanet`.

    sarjax train cheng_deeplabv3 --workdir runs/cheng_deeplabv3
    """
    return _with(DeepLabV3())


def cheng_pspnet() -> Config:
    """Table 1, PSPNet: ResNet-50 at output stride 8, as Table 2 counts it; the rest as `cheng_lanet`.

    sarjax train cheng_pspnet --workdir runs/cheng_pspnet
    """
    return _with(PSPNet())


def cheng_lanet_official() -> Config:
    """`cheng_lanet` on the official split, 80 scenes to train on and 20 to test: for comparison with those who use it.

    There is no val split, so nothing is chosen by one: the last checkpoint is evaluated.

        sarjax data build whu_opt_sar --config scene_official --source WHU-OPT-SAR
        sarjax train cheng_lanet_official --workdir runs/cheng_lanet_official
        sarjax eval runs/cheng_lanet_official --split test
    """
    return _on("scene_official", keep_best=False)


def cheng_lanet_random_tile() -> Config:
    """`cheng_lanet` on tiles split at random, 60/20/20: for comparison with papers that do so, and nothing else.

    Neighbouring tiles of a scene fall into different splits, so its figures are too good.

        sarjax data build whu_opt_sar --config random_tile --source WHU-OPT-SAR
        sarjax train cheng_lanet_random_tile --workdir runs/cheng_lanet_random_tile
    """
    return _on("random_tile")


def whu_lanet_optical() -> Config:
    """`cheng_lanet` from the four optical bands, as a ceiling for what SAR alone may reach; no row of the paper.

    sarjax train whu_lanet_optical --workdir runs/whu_lanet_optical
    """
    config = cheng_lanet()
    return dataclasses.replace(
        config, experiment=dataclasses.replace(config.experiment, inputs=Inputs(modalities=("optical",)))
    )


def _with(network: NetworkOptions) -> Config:
    """`cheng_lanet` with another network."""
    config = cheng_lanet()
    return dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, network=network))


def cheng_instance() -> Config:
    """Table 3, instance contrastive task: `cheng_lanet` and the instance loss on views of tiles and their neighbours.

    Stated: K = 3, unit weights, batch 32. Temperatures, projectors, views and the warm-up of 5 epochs are ours or the
    public code's.

    sarjax train cheng_instance --workdir runs/cheng_instance
    """
    return _with_clustering(instance=1.0, cluster=0.0)


def cheng_cluster() -> Config:
    """Table 3, cluster contrastive task: `cheng_lanet` and the cluster loss, M = 10.

    sarjax train cheng_cluster --workdir runs/cheng_cluster
    """
    return _with_clustering(instance=0.0, cluster=1.0)


def cheng_both() -> Config:
    """Table 1, "our method" (= Table 3, both contrastive tasks).

    sarjax train cheng_both --workdir runs/cheng_both
    """
    return _with_clustering()


def cheng_both_augmentation() -> Config:
    """`cheng_both` without neighbours: a tile's partner is another view of itself; no row of the paper.

    sarjax train cheng_both_augmentation --workdir runs/cheng_both_augmentation
    """
    return _with_clustering(positives="augmentation")


def cheng_both_bank() -> Config:
    """`cheng_both` with features of neighbours from the bank as partners (NNCLR) in place of their tiles; no row of
    the paper.

    sarjax train cheng_both_bank --workdir runs/cheng_both_bank
    """
    return _with_clustering(positives="bank")


def cheng_both_tenth() -> Config:
    """`cheng_both` with a tenth of the weight on either task; no row of the paper.

    sarjax train cheng_both_tenth --workdir runs/cheng_both_tenth
    """
    return _with_clustering(instance=0.1, cluster=0.1)


def _with_clustering(instance: float = 1.0, cluster: float = 1.0, **others: Any) -> Config:
    config = cheng_lanet()
    clustering = Clustering(instance=instance, cluster=cluster, clusters=10, neighbours=3, **others)
    method = SceneClustering(clustering=clustering)
    return dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, method=method))


def _on(configuration: str, keep_best: bool = True) -> Config:
    """`cheng_lanet` on another configuration of the builder."""
    config = cheng_lanet()
    return dataclasses.replace(
        config,
        experiment=dataclasses.replace(config.experiment, data=Data("whu_opt_sar", configuration)),
        execution=dataclasses.replace(config.execution, keep_best=keep_best),
    )


def whu_fcn() -> Config:
    """A plain FCN head on the whole ResNet-18, as a floor; no row of the paper.

    sarjax train whu_fcn --workdir runs/whu_fcn
    """
    return _with(FCN())


RECIPES = (
    cheng_instance,
    cheng_cluster,
    cheng_both,
    cheng_both_augmentation,
    cheng_both_bank,
    cheng_both_tenth,
    cheng_lanet,
    cheng_fcn_se,
    cheng_deeplabv3,
    cheng_pspnet,
    cheng_lanet_official,
    cheng_lanet_random_tile,
    whu_lanet_optical,
    whu_fcn,
)
