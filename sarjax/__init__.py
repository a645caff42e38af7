"""sarjax: semantic segmentation of SAR scenes, helped by optical imagery, in JAX.

What a script needs is here: `sarjax.Config`, `sarjax.open_dataset`, `sarjax.build_network`, and the rest of `__all__`.
Each is loaded when it is first asked for, so that `import sarjax` loads no jax. A name that is also a folder is not
here: training is `sarjax.train.loop.train`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> module that holds it under that name.
_PUBLIC: dict[str, str] = {
    **dict.fromkeys(
        ("Augment", "Config", "Data", "Execution", "Experiment", "Inputs", "Mesh", "Optimizer"), "sarjax.config"
    ),
    **dict.fromkeys(("MethodOptions", "NetworkOptions"), "sarjax.options"),
    **dict.fromkeys(("BandSpec", "ClassSpec", "DatasetSpec", "ModalitySpec", "Statistics", "Stream"), "sarjax.spec"),
    "UserError": "sarjax.errors",
    **dict.fromkeys(("Dataset", "open_dataset", "open_directory"), "sarjax.data.store"),
    **dict.fromkeys(("channel_count", "network_inputs"), "sarjax.augment.inputs"),
    "build_network": "sarjax.models",
    "build_method": "sarjax.methods",
    **dict.fromkeys(("Context", "Head", "Method", "Outputs", "Rest", "Schedule", "Term"), "sarjax.methods.record"),
    "Evaluation": "sarjax.evaluate.evaluator",
    "restore_run": "sarjax.train.run",
    **dict.fromkeys(("draw_panels", "evaluate_run"), "sarjax.reports.run"),
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
