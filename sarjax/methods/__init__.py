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
