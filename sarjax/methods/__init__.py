"""The methods: `METHODS` is the one place where they are listed; a module is imported when its method is built."""

import importlib
from typing import Any

from sarjax.errors import UserError, unknown
from sarjax.options.base import check

METHODS: dict[str, str] = {
    "dhfa": "sarjax.methods.dhfa:dhfa",
    "dllr": "sarjax.methods.dllr:dllr",
    "frd": "sarjax.methods.frd:frd",
    "scene_clustering": "sarjax.methods.scene_clustering:scene_clustering",
    "supervised": "sarjax.methods.supervised:supervised",
}


def build_method(context: Any, *, for_inference: bool = False) -> Any:
    """The `Method` that `context.experiment.method` names; UserError where an option, the data set or the
    teacher do not fit.

    for_inference: no teacher is needed, since heads never read one.
    """
    check(context.experiment.method, "method")
    _check_dates(context)
    name = context.experiment.method.NAME
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module, factory = METHODS[name].split(":")
    method = getattr(importlib.import_module(module), factory)(context.experiment.method, context)
    if for_inference:
        return method
    if method.teacher is None and context.teacher is not None:
        raise UserError(f"method {name!r} takes no teacher; leave --teacher out.")
    if method.teacher is not None:
        if context.teacher is None:
            raise UserError(f"method {name!r} needs a teacher: give --teacher RUN, the directory of a trained run.")
        method.teacher(context.teacher)
    return method


def _check_dates(context: Any) -> None:
    """UserError where the network compares dates and the inputs do not keep them apart, or the other way round."""
    from sarjax.augment.inputs import dates_of

    network, inputs, spec = context.experiment.network, context.experiment.inputs, context.spec
    if inputs.by_date != (network.DATES > 1):
        seen, fits = ("dates one by one", "true") if network.DATES > 1 else ("all channels as one image", "false")
        raise UserError(
            f"inputs.by_date is {str(inputs.by_date).lower()}, but network {network.NAME!r} looks at {seen}: {fits} "
            "fits."
        )
    if network.DATES > 1 and len(set(dates_of(inputs, spec))) != network.DATES:
        raise UserError(
            f"network {network.NAME!r} compares {network.DATES} dates, but inputs.dates is {inputs.dates!r} of "
            f"{spec.dates} in data set {spec.name!r}: data of {network.DATES} dates, or as many different ones, fit."
        )
