"""Networks: arrays in, arrays out. `build_network` makes one from its options.

A network is a flax module with

    __call__(x: (b, h, w, c), train: bool) -> Prediction
    encode(x, train) -> {stride: features}, through `module.apply(variables, x, train, method="encode")`

and the attributes `num_classes`, `dtype`, the compute dtype, `context`, its `FieldOfView`, and `classifies`;
parameters, running statistics and logits are float32. Where `classifies` is True (all but LANet, which has two
classifiers) it also has

    classify(embedding, size: (h, w)) -> logits: (b, h, w, k), through `module.apply(..., method="classify")`

by which its logits come from `Prediction.embedding`: another network's embedding can be put there. What distillation
compares is `Prediction.pyramid`, {stride: features} fine to coarse, and `Prediction.embedding`.
Under `train` batch-norm uses the batch's statistics; the running ones change where "batch_stats" is mutable.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sarjax.errors import unknown
from sarjax.options import NetworkOptions

if TYPE_CHECKING:
    import flax.linen as nn

# Name of the options -> "module:factory"; the factory is (options, num_classes, dtype) -> nn.Module.
NETWORKS: dict[str, str] = {
    "fcn": "sarjax.models.segmenters:build_fcn",
    "lanet": "sarjax.models.lanet:build_lanet",
    "deeplabv3": "sarjax.models.deeplab:build_deeplab",
    "pspnet": "sarjax.models.pspnet:build_pspnet",
    "dhfa": "sarjax.models.dhfa:build_dhfa",
    "dllr": "sarjax.models.dllr:build_dllr",
    "change": "sarjax.models.change:build_change",
    "fc_siam_diff": "sarjax.models.change:build_fc_siam_diff",
}


def build_network(options: NetworkOptions, num_classes: int, dtype: Any = "float32") -> "nn.Module":
    """The network that `options` describe. Makes no arrays: weights come from `init` and `torchvision.load_encoder`.

    num_classes: channels of the logits. dtype: compute dtype, "float32" or "bfloat16".
    Raises UserError for options that no network is registered for.
    """
    if options.NAME not in NETWORKS:
        raise unknown("network", options.NAME, NETWORKS)
    module, factory = NETWORKS[options.NAME].split(":")
    return getattr(importlib.import_module(module), factory)(options, num_classes, dtype)
