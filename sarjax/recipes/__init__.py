"""Named runs: every row of every table is a recipe, values only. A recipe is a function whose docstring says which
row it stands for and how to run it; `PRESETS` change one to fit a machine."""

import dataclasses
from collections.abc import Callable

from sarjax.config import Config
from sarjax.errors import unknown
from sarjax.recipes import cheng, dhfa, dllr, frd, ombria, synthetic

RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f for module in (cheng, dhfa, dllr, frd, ombria, synthetic) for f in module.RECIPES
}


def cpu(config: Config) -> Config:
    """For two cores without an accelerator: a quarter of the width, a third of the epochs."""
    e = config.experiment
    network = dataclasses.replace(e.network, width=e.network.width / 4)
    return dataclasses.replace(config, experiment=dataclasses.replace(e, network=network, epochs=e.epochs / 3))


PRESETS: dict[str, Callable[[Config], Config]] = {"cpu": cpu}


def find(name: str, preset: str = "") -> Config:
    """The configuration of a recipe; UserError suggests the nearest name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if preset and preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    config = dataclasses.replace(RECIPES[name](), recipe=f"{name}+{preset}" if preset else name)
    return PRESETS[preset](config) if preset else config
