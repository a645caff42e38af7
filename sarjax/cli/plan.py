"""The verb that says what a run would need on devices that are not there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from sarjax.cli import common
from sarjax.cli.common import note, print_json
from sarjax.cli.training import _default, _exchanged, _taken
from sarjax.errors import UserError

Kind = Literal["h100", "h200", "v5e", "v5p"]


def plan_verb(args: Sequence[str]) -> None:
    """Plan a recipe on devices that are not there: memory, traffic, time, the largest batch; runs nothing"""
    from sarjax import recipes
    from sarjax.recipes import tables

    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            print(
                "usage: sarjax plan RECIPE --devices N --device-kind h100|h200|v5e|v5p [--data NAME] [--preset NAME] "
                "[--network NAME] [--method NAME] [any dotted field]\n"
            )
            print("RECIPE may also be a run's config.json. `sarjax plan RECIPE --help` lists the fields.")
            return
        raise UserError(f"sarjax plan needs a recipe first: {', '.join(recipes.RECIPES)}, or a run's config.json.")
    name, rest = args[0], list(args[1:])
    data, rest = _taken("data", rest, tables.DATA)
    preset, rest = _taken("preset", rest, recipes.PRESETS)
    default = _default(name, data, preset)
    for part in ("network", "method"):
        default, rest = _exchanged(default, part, rest)
    experiment_type, execution_type = type(default.experiment), type(default.execution)

    def plan(
        devices: int,
        device_kind: Kind,
        experiment: Annotated[experiment_type, tyro.conf.arg(name="")] = default.experiment,
        execution: Annotated[execution_type, tyro.conf.arg(name="")] = default.execution,
        teacher: str = "",
        efficiency: float = 0.3,
        tiles: int = 0,
        compile_devices: int = 8,
        json: FlagCreatePairsOff[bool] = False,
    ) -> None:
        """Plan a recipe on devices that are not there.

        Args:
            devices: how many.
            device_kind: of which kind.
            experiment: identity of the run.
            execution: how and where it runs; the mesh counts, and where records are.
            teacher: the run that teaches, or the recipe of one, where the method needs it.
            efficiency: share of the printed peak that computing reaches, an assumption.
            tiles: training tiles, where there are no records (0 = 20,000).
            compile_devices: devices of the small mesh that is compiled; as many as --devices extrapolates nothing.
            json: print JSON instead of text.
        """
        import dataclasses

        from sarjax.config import validate

        config = dataclasses.replace(default, experiment=experiment, execution=execution)
        validate(config)
        for what, value in (("devices", devices), ("compile-devices", compile_devices)):
            if value < 1:
                raise UserError(f"--{what} is {value}; a whole number from 1 is accepted.")
        if not 0 < efficiency <= 1:
            raise UserError(f"--efficiency is {efficiency:g}; a share above 0 and up to 1 is accepted.")
        if tiles < 0:
            raise UserError(f"--tiles is {tiles}; a whole number from 1, or 0 for the usual, is accepted.")
        found = _planned(
            config,
            given=experiment.batch_size != default.experiment.batch_size,
            devices=devices,
            kind=device_kind,
            teacher=teacher,
            data=data,
            efficiency=efficiency,
            tiles=tiles,
            limit=compile_devices,
        )
        if json:
            print_json(found)
        else:
            _print(found)

    tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(plan),
        prog=f"sarjax plan {name}",
        description=plan_verb.__doc__,
        args=rest,
    )


def _planned(
    config: Any,
    *,
    given: bool,
    devices: int,
    kind: str,
    teacher: str,
    data: str,
    efficiency: float,
    tiles: int,
    limit: int,
) -> dict[str, Any]:
    """The plan of a configuration. given: whether the batch was asked for."""
    import dataclasses

    import jax

    common.devices(2 * limit)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: an accelerator is left alone
    from sarjax.data.declared import described
    from sarjax.train.devices import KINDS
    from sarjax.train.mesh import axis_sizes
    from sarjax.train.plan import Asked, fitting_batch, plan

    experiment, execution = config.experiment, config.execution
    sizes = axis_sizes(execution.mesh, devices)
    known, where = described(experiment.data.name, experiment.data.config, execution.data_dir, tiles)
    notes = [where]
    batch = fitting_batch(experiment, sizes)
    if batch != experiment.batch_size and not given:
        notes.append(
            f"batch: {devices} devices cannot share the recipe's {experiment.batch_size} rows equally: {batch} are "
            f"planned, and --batch-size {batch} would be needed to train"
        )
        experiment = dataclasses.replace(experiment, batch_size=batch)
    taught = None
    if teacher:
        taught, said = teacher_of(teacher, data, experiment, known)
        notes.append(said)
    asked = Asked(experiment, known, sizes, KINDS[kind], taught, efficiency, tuple(notes))
    with common.stoppable("nothing was written"):
        return {"recipe": config.recipe} | plan(asked, limit=limit, say=note)


def teacher_of(name: str, data: str, experiment: Any, known: Any) -> tuple[Any, str]:
    """(a run, or a recipe on the same data, as a teacher without weights; a sentence that says which)."""
    import dataclasses

    from sarjax.methods import build_method
    from sarjax.methods.record import Context, Schedule, Teacher
    from sarjax.recipes import RECIPES
    from sarjax.train.teacher import describe

    if (Path(name) / "config.json").is_file():
        return describe(Path(name), experiment.precision), f"teacher: the run {name}"
    if name not in RECIPES:
        raise UserError(
            f"--teacher {name} is neither a run's directory nor a recipe; a directory made by `sarjax train`, or a "
            "name that `sarjax recipes` lists, is accepted."
        )
    theirs = dataclasses.replace(_default(name, data, "").experiment, precision=experiment.precision)
    schedule = Schedule(1, 1, 1)
    method = build_method(Context(theirs, known.spec, known.statistics, schedule), for_inference=True)
    return Teacher(method, theirs, known.spec, known.statistics), f"teacher: as the recipe {name} would train it"


def _print(found: dict[str, Any]) -> None:
    kind, memory, seconds, largest = (found[key] for key in ("kind", "memory", "seconds", "largest_batch"))
    mesh, small = (
        " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        for sizes in (found["mesh"], found["compiled"]["programs"][0]["mesh"])
    )
    print(f"{found['recipe']} on {found['devices']} x {kind['name']}: {mesh}")
    print(f"batch {found['batch']}, {found['precision']}")
    how = "for this mesh" if found["compiled"]["exactly"] else f"for {small}, extrapolated"
    print(f"compiled {how} (XLA for the CPU, jax {found['compiled']['jax']}); nothing was run. {found['caveat']}\n")

    print("memory of a device, MiB")
    for name in (*found["exact"], "temporaries"):
        about = "exact" if name in found["exact"] else "estimate"
        if memory[name]:
            print(f"  {name:<14}{memory[name] / 2**20:>12,.1f}  {about}")
    print(f"  {'total':<14}{memory['total'] / 2**20:>12,.1f}  estimate, of {memory['usable'] / 2**20:,.0f} usable")
    each = f"{largest['rows_per_device']:,} rows a device, {largest['bytes_per_row'] / 2**20:,.1f} MiB each"
    print(f"largest batch: {largest['batch']:,} ({each}), estimate\n")

    print("sent by a device in a step, estimate")
    print(f"  {'what':<28}{'along (devices)':<20}{'arrays':>7}{'result MB':>12}{'sent MB':>11}{'ms':>9}")
    for one in found["collectives"]:
        what, along = f"{one['purpose']}, {one['kind']}", f"{'+'.join(one['axes']) or '-'} ({one['devices']})"
        figures = f"{one['bytes'] / 1e6:>12.3f}{one['sent'] / 1e6:>11.3f}{one['seconds'] * 1e3:>9.3f}"
        print(f"  {what:<28}{along:<20}{one['count']:>7}{figures}")
    sent, least = found["sent_bytes"] / 1e6, found["least_sent_bytes"] / 1e6
    print(f"  in all {sent:.3f} MB; parameters and gradients alone need {least:.3f}\n")

    rate, work = f"{found['rows_per_second']:,.0f} rows/s", f"{found['flops'] / 1e9:,.1f} GFLOP a device"
    print(f"time of a step: {seconds['step'] * 1e3:.2f} ms, {rate}; a model, never measured")
    print(f"  computing {seconds['computing'] * 1e3:.2f} ms: {work} at {found['efficiency']:.0%} of the peak, assumed")
    print(f"  memory {seconds['memory'] * 1e3:.2f} ms: {found['memory_traffic_bytes'] / 1e9:,.2f} GB a device")
    print(f"  sending {seconds['sending'] * 1e3:.2f} ms\n")
    print("how the figures were made")
    for what, how in found["estimates"].items():
        print(f"  {what}: {how}")
    print(f"  {kind['name']}: {'; '.join(kind['sources'])}; {'; '.join(kind['notes'])}")
