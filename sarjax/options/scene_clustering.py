"""Options of scene clustering (Cheng et al.), and of the same as an auxiliary of other methods."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from sarjax.options.base import COUNT, NOT_NEGATIVE, POSITIVE_COUNT, SHARE, Accepts
from sarjax.options.supervised import Supervised

MOST_NEIGHBOURS = 4096  # the rows of the smallest bank
TEMPERATURE: Accepts = "a number from 0.001", lambda v: 1e-3 <= v < math.inf


@dataclasses.dataclass(frozen=True)
class Clustering:
    """The auxiliary objectives: which, on which pairs, and what they are computed from.

    instance, cluster: weights of the two contrastive losses (0 = without). clusters: M. positives: the partner of a
    view is another view of the tile itself ("augmentation"); of the tile or one of its `neighbours` nearest ones, drawn
    evenly ("knn"); or the feature that the bank holds of one of these, without a second tile ("bank"). warmup: epochs
    of pure augmentation before the first neighbours are looked up. temperatures, include_self: see
    `sarjax.losses.contrastive`. hidden, dimensions: of the projectors. region, jitter, speckle: how strongly views are
    changed, see `config.Augment`; their size is that of the run's crops.
    """

    ACCEPTED: ClassVar[Mapping[str, Accepts]] = {
        "instance": NOT_NEGATIVE,
        "cluster": NOT_NEGATIVE,
        "clusters": ("a whole number from 2", lambda v: v >= 2),
        "neighbours": (f"a whole number from 1 to {MOST_NEIGHBOURS}", lambda v: 1 <= v <= MOST_NEIGHBOURS),
        "warmup": COUNT,
        "instance_temperature": TEMPERATURE,
        "cluster_temperature": TEMPERATURE,
        "hidden": POSITIVE_COUNT,
        "dimensions": POSITIVE_COUNT,
        "region": SHARE,
        "jitter": NOT_NEGATIVE,
        "speckle": NOT_NEGATIVE,
    }
    instance: float = 1.0
    cluster: float = 1.0
    clusters: int = 10
    positives: Literal["knn", "augmentation", "bank"] = "knn"
    neighbours: int = 3
    warmup: int = 5
    instance_temperature: float = 0.5
    cluster_temperature: float = 1.0
    include_self: bool = False
    hidden: int = 128
    dimensions: int = 128
    region: float = 0.5
    jitter: float = 0.2
    speckle: float = 4.0


@dataclasses.dataclass(frozen=True)
class SceneClustering(Supervised):
    """Supervised segmentation helped by `clustering` of whole tiles (Cheng et al.)."""

    NAME: ClassVar[str] = "scene_clustering"
    clustering: Clustering = Clustering()
