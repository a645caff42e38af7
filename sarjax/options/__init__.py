"""Options of networks and methods: frozen dataclasses of plain values, a file per paper.

A subclass names itself with `NAME`; it is found by that name when a configuration is read back.
"""

from sarjax.options.base import MethodOptions, Named, NetworkOptions
from sarjax.options.deeplab import DeepLabV3
from sarjax.options.dhfa import DHFA, Distillation
from sarjax.options.dllr import DLLR, LabelReassignment
from sarjax.options.frd import Change, FCSiamDiff, RelationalDistillation
from sarjax.options.lanet import FCN, LANet
from sarjax.options.pspnet import PSPNet
from sarjax.options.scene_clustering import Clustering, SceneClustering
from sarjax.options.supervised import Supervised

__all__ = [
    "DHFA",
    "DLLR",
    "FCN",
    "Change",
    "Clustering",
    "DeepLabV3",
    "Distillation",
    "FCSiamDiff",
    "LANet",
    "LabelReassignment",
    "MethodOptions",
    "Named",
    "NetworkOptions",
    "PSPNet",
    "RelationalDistillation",
    "SceneClustering",
    "Supervised",
]
