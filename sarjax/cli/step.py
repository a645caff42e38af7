"""`sarjax bench step`: a training step beside PyTorch's."""

from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff

from sarjax.cli import common
from sarjax.cli.common import note
from sarjax.cli.plan import teacher_of
from sarjax.cli.training import _default, _exchanged, _taken
from sarjax.errors import UserError


def step_verb(args: Sequence[str]) -> None:
    """Time a recipe's training step beside PyTorch's, plain and compiled: bench step RECIPE"""
    from sarjax import recipes
    from sarjax.recipes import tables

    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            print("usage: sarjax bench step RECIPE [--size N] [--data NAME] [--preset NAME] [any dotted field]\n")
            print("`sarjax bench step RECIPE --help` lists the fields.")
            return
        raise UserError("sarjax bench step needs a recipe first; `sarjax recipes` lists them.")
    name, rest = args[0], list(args[1:])
    data, rest = _taken("data", rest, tables.DATA)
    preset, rest = _taken("preset", rest, recipes.PRESETS)
    default = _default(name, data, preset)
    for part in ("network", "method"):
        default, rest = _exchanged(default, part, rest)
    experiment_type, mesh_type = type(default.experiment), type(default.execution.mesh)

    def step(
        experiment: Annotated[experiment_type, tyro.conf.arg(name="")] = default.experiment,
        mesh: mesh_type = default.execution.mesh,
        size: int = 256,
        teacher: str = "",
        host_devices: int = 0,
        repetitions: int = 5,
        torch: bool = True,
        compile: bool = True,
        json: FlagCreatePairsOff[bool] = False,
    ) -> None:
        """Time a recipe's training step beside PyTorch's.

        Both start from the same random weights, see the same batch of noise and must begin with the same loss;
        augmentation, masks and dropped sensors are turned off on both sides. Nothing is read, nothing is written.

        Args:
            experiment: identity of the run; --batch-size and --precision are often asked for.
            mesh: devices per axis.
            size: side of the tiles in pixels.
            teacher: the recipe (or run) that a student learns from; its weights are random here.
            host_devices: CPU devices (0 = one per core).
            repetitions: timed steps of each side.
            torch: time PyTorch beside it; False: ours alone.
            compile: time torch.compile too, which compiles for a minute.
            json: print one JSON line instead of a table.
        """
        from sarjax.cli.bench import show
        from sarjax.config import Config, Execution, validate

        validate(Config(experiment=experiment, execution=Execution(mesh=mesh, host_devices=host_devices)))
        if size < 1:
            raise UserError(f"--size is {size}; the side of a tile in pixels is accepted.")
        common.devices(host_devices)
        from sarjax.bench.step import bench_step
        from sarjax.data.declared import declared

        known = declared(experiment.data.name, experiment.data.config)._replace(tile=(size, size))
        taught = None
        if teacher:
            taught, said = teacher_of(teacher, data, experiment, known)
            note(said)
        peers = ("torch", "torch.compile")[: 1 + compile] if torch else ()
        found = bench_step(experiment, known, mesh=mesh, teacher=taught, repetitions=repetitions, peers=peers, say=note)
        show({"recipe": default.recipe, **found}, json)

    tyro.cli(tyro.conf.configure(tyro.conf.AvoidSubcommands)(step), prog=f"sarjax bench step {name}", args=rest)
