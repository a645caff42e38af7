"""DHFA-Net (Gao et al.): a pyramid of features that are aligned as they are joined, and learning from a teacher."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from sarjax.options.base import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Accepts, NetworkOptions
from sarjax.options.scene_clustering import Clustering
from sarjax.options.supervised import Supervised


@dataclasses.dataclass(frozen=True)
class DHFA(NetworkOptions):
    """Feature pyramid whose coarse maps are sampled at learnt offsets (HFAM), the same for teacher and student.

    channels: of every map of the pyramid, before `width`; 256 is usual with resnet50. bins: sides of the grids of
    means beside the coarsest features. alignment: "none" = bilinear upsampling, a plain pyramid. corner_aligned: the
    grid of SFNet, which maps corners on corners and has zeros outside of the map. fuse: maps of the other modality are
    hallucinated from each level, and the head reads both.
    """

    NAME: ClassVar[str] = "dhfa"
    channels: int = 128
    bins: tuple[int, ...] = (1, 2, 3, 6)
    alignment: Literal["flow", "none"] = "flow"
    corner_aligned: bool = False
    fuse: bool = False


@dataclasses.dataclass(frozen=True)
class Distillation(Supervised):
    """Supervised segmentation by a student that also learns from a frozen teacher, which may see other sensors.

    reading: of HFDM, what of the student is compared with the teacher's features: "direct", the features themselves
    (through a 1x1 convolution where channels differ); "hallucinate", what a small network makes of them, which is
    dropped after training. The third reading, fuse, is `network.fuse` with "direct": such networks are then part of
    the student, stay, and are fused. features: weight of their loss; feature_loss: of unit vectors per pixel, or of
    plain squares.
    head: weight of the cross-entropy of the teacher's frozen classifier on the student's embedding. logits: weight of
    logit distillation; logit_loss: per pixel over the classes, or per class over the pixels; temperature: of both.
    hard: weight of the cross-entropy (and Dice, by `dice`) with the teacher's answers where nothing is labelled.

    pairs: unlabelled rows per labelled one, from which the teacher alone teaches (0 = none; needs
    experiment.data.labelled below 1). right: leave out labelled pixels where the teacher is wrong. confidence: leave
    out pixels where its largest probability is below this. clustering: scene clustering beside it (weights 0 = none).
    """

    NAME: ClassVar[str] = "dhfa"
    ACCEPTED: ClassVar[Mapping[str, Accepts]] = {
        **Supervised.ACCEPTED,
        **dict.fromkeys(("features", "head", "logits", "hard"), NOT_NEGATIVE),
        "temperature": POSITIVE,
        "pairs": COUNT,
        "confidence": SHARE,
    }
    reading: Literal["direct", "hallucinate"] = "direct"
    features: float = 1.0
    feature_loss: Literal["normalised", "squared"] = "normalised"
    head: float = 0.4
    logits: float = 1.0
    logit_loss: Literal["pixel", "channel"] = "pixel"
    temperature: float = 2.0
    hard: float = 0.0
    pairs: int = 0
    right: bool = False
    confidence: float = 0.0
    clustering: Clustering = Clustering(instance=0.0, cluster=0.0)
