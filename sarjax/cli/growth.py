"""`sarjax bench growth`: what grows with batch, image, devices and tiles, and how fast."""

from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff

from sarjax.cli import common
from sarjax.cli.common import note
from sarjax.cli.plan import teacher_of
from sarjax.cli.training import _default, _exchanged, _taken
from sarjax.errors import UserError

RECIPE = "cheng_lanet"


def growth_verb(args: Sequence[str]) -> None:
    """Measure how memory, collectives and seconds grow with batch, image, devices and tiles: bench growth [RECIPE]"""
    from sarjax.bench.growth import Ranges
    from sarjax.recipes import PRESETS, tables

    rest = list(args)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else RECIPE
    data, rest = _taken("data", rest, tables.DATA)
    preset, rest = _taken("preset", rest, PRESETS)
    default = _default(name, data, preset)
    for part in ("network", "method"):
        default, rest = _exchanged(default, part, rest)
    experiment_type = type(default.experiment)

    def growth(
        experiment: Annotated[experiment_type, tyro.conf.arg(name="")] = default.experiment,
        parts: tuple[str, ...] = (),
        along: Ranges = Ranges(),  # noqa: B008
        size: int = 256,
        teacher: str = "",
        repetitions: int = 5,
        json: FlagCreatePairsOff[bool] = False,
    ) -> None:
        """Measure how memory, collectives and seconds grow.

        Memory and collectives are the compiler's, for host devices, from shapes: nothing of them is run. Seconds are of
        made-up tiles and scenes.

        Args:
            experiment: identity of the run; the batch is that of each step of a refresh.
            parts: batch, size, fsdp, devices, largest, neighbours, refresh, build (default: all).
            along: of what sizes.
            size: side of the tiles in pixels, where it is not what grows.
            teacher: the recipe (or run) that a student learns from, where the method needs one.
            repetitions: timed calls of what is measured, after a warm-up.
            json: print one JSON line instead of tables.
        """
        from sarjax.cli.bench import show
        from sarjax.config import Config, validate

        validate(Config(experiment=experiment))
        if size < 1:
            raise UserError(f"--size is {size}; the side of a tile in pixels is accepted.")
        common.devices(max(*along.shards, *along.devices, 1))
        from sarjax.bench.growth import bench_growth
        from sarjax.data.declared import declared

        known = declared(experiment.data.name, experiment.data.config)._replace(tile=(size, size))
        taught = None
        if teacher:
            taught, said = teacher_of(teacher, data, experiment, known)
            note(said)
        with common.stoppable("nothing was written"):
            found = bench_growth(
                experiment, known, parts=parts, ranges=along, teacher=taught, repetitions=repetitions, say=note
            )
        show({"recipe": default.recipe, **found}, json)

    tyro.cli(tyro.conf.configure(tyro.conf.AvoidSubcommands)(growth), prog=f"sarjax bench growth {name}", args=rest)
