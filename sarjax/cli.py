"""`sarjax <verb>`: parse, call, and turn known errors into one line. Loads no jax until a verb needs it."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.errors import UserError, unknown
from sarjax.machine import visible_cores


def _note(text: str) -> None:
    """Progress and notices go to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _devices(host_devices: int = 0) -> None:
    """Sets the number of CPU devices (0 = one per core); has to come before anything else asks jax for devices."""
    import logging

    import jax

    logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoint library warns of what is meant
    jax.config.update("jax_num_cpu_devices", host_devices or visible_cores())


# ---------------------------------------------------------------------------------------------------------- training


def _train(args: Sequence[str]) -> None:
    """Train a recipe; the same command goes on where a run stopped"""
    from sarjax import recipes

    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            print("usage: sarjax train RECIPE --workdir RUN [--preset NAME] [any dotted field]\n")
            print("RECIPE may also be a run's config.json: its values are then the defaults of a run of the same data.")
            print("`sarjax train RECIPE --help` lists the fields; the recipes are:\n")
            _recipes([])
            return
        raise UserError(f"sarjax train needs a recipe first: {', '.join(recipes.RECIPES)}, or a run's config.json.")
    name, rest = args[0], list(args[1:])
    preset = ""
    if "--preset" in rest:
        at = rest.index("--preset")
        if at + 1 == len(rest):
            raise UserError(f"--preset needs a name: {', '.join(recipes.PRESETS)}.")
        preset = rest[at + 1]
        del rest[at : at + 2]
    default = _default(name, preset)
    experiment_type, execution_type = type(default.experiment), type(default.execution)

    def train(
        workdir: Path,
        experiment: Annotated[experiment_type, tyro.conf.arg(name="")] = default.experiment,
        execution: Annotated[execution_type, tyro.conf.arg(name="")] = default.execution,
        teacher: Path | None = None,
        init_from: Path | None = None,
        extend_steps: int = 0,
    ) -> None:
        """Train a recipe; the same command goes on where a run stopped.

        Args:
            workdir: the run's directory; made when it is not there.
            experiment: identity of the run.
            execution: how and where it runs; may change between starts.
            teacher: directory of the trained run that teaches this one.
            init_from: directory of a run whose parameters a new run starts from.
            extend_steps: go on to this many steps: the one allowed change of an existing run.
        """
        import dataclasses

        from sarjax.config import validate

        config = dataclasses.replace(default, experiment=experiment, execution=execution)
        validate(config)
        _devices(_host_devices(workdir, config))
        from sarjax.train.loop import train as run

        for what, path in (("--teacher", teacher), ("--init-from", init_from)):
            known = what == "--teacher" and (workdir / "teacher").is_dir()  # copied: its own run may be gone
            if path is not None and not known and not (path / "config.json").is_file():
                raise UserError(f"{what} {path} holds no run; a directory made by `sarjax train` is accepted.")
        run(config, workdir, teacher=teacher, init_from=init_from, extend_steps=extend_steps, say=_note)

    recipe = recipes.RECIPES.get(default.recipe.split("+")[0])
    doc = (recipe and recipe.__doc__) or ""
    tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(train), prog=f"sarjax train {name}", description=doc, args=rest
    )


def _default(name: str, preset: str) -> Any:
    """The configuration that a training starts from: of a recipe, or of a config.json."""
    from sarjax import config, recipes

    if not name.endswith(".json"):
        return recipes.find(name, preset)
    if preset:
        raise UserError(f"--preset {preset} changes a recipe; {name} says all of a run and takes none.")
    return config.read(Path(name))


def _host_devices(workdir: Path, config: Any) -> int:
    """CPU devices of a run: as at its first start; else as asked; else one per core that the batch can be cut over."""
    from sarjax.train.run import read_manifest

    asked = config.execution.host_devices
    fixed = read_manifest(workdir).get("host_devices", 0)
    if fixed and asked and fixed != asked:
        raise UserError(
            f"{workdir} runs on {fixed} host devices since its first start, not {asked}: leave --host-devices out, or "
            "use another --workdir."
        )
    if fixed or asked:
        return fixed or asked
    rows = config.experiment.batch_size // max(1, config.experiment.accumulate)
    return next(n for n in range(min(visible_cores(), max(rows, 1)), 0, -1) if rows % n == 0)


def evaluate(
    run: Positional[Path],
    split: Literal["val", "test"] = "val",
    checkpoint: Literal["best", "last"] = "best",
    ema: FlagCreatePairsOff[bool] = False,
    head: str = "",
    data_dir: str = "",
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Evaluate a run: table, CSV and a picture of the confusion matrix

    Args:
        run: the run's directory.
        split: what to evaluate on; every look at test is recorded in the run's manifest.
        checkpoint: the best on val, or the last.
        ema: evaluate the running mean of the parameters.
        head: which of the method's heads ("" = its default).
        data_dir: where built records are ("" = as the run was trained, else $SARJAX_DATA_DIR or ~/sarjax_data).
        json: print JSON instead of a table.
    """
    from sarjax.train.run import read_manifest

    _devices(read_manifest(run).get("host_devices", 0))
    from sarjax.reports.evaluation import table, to_dict
    from sarjax.reports.run import evaluate_run

    result = evaluate_run(run, split=split, checkpoint=checkpoint, ema=ema, head=head, data_dir=data_dir, say=_note)
    if json:
        _print_json({"run": str(run), "split": split, "step": result.step} | to_dict(result.evaluation, result.spec))
    else:
        from rich.console import Console

        Console().print(table(result.evaluation, result.spec, f"{run}, {split}, step {result.step}"))
    _note(f"written: {', '.join(str(p) for p in result.files)}")


def show(run: Positional[Path], json: FlagCreatePairsOff[bool] = False) -> None:
    """Show a run: what it is, how far it is, its best, its curves

    Args:
        run: the run's directory.
        json: print JSON instead of text.
    """
    from sarjax.reports.run import describe, draw_curves

    facts = describe(run)
    if json:
        _print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    picture = draw_curves(run)
    if picture:
        _note(f"written: {picture}")


# -------------------------------------------------------------------------------------------------------------- data


def build(
    name: Positional[str],
    source: Path,
    out: Path | None = None,
    config: str = "",
    overwrite: FlagCreatePairsOff[bool] = False,
) -> None:
    """Build a data set's records from its files

    Args:
        name: which data set.
        source: the folder that its files were unpacked to.
        out: where records go (default: $SARJAX_DATA_DIR, else ~/sarjax_data).
        config: a configuration of the builder ("" = its default).
        overwrite: build again what is there.
    """
    from sarjax.data.build import build as run
    from sarjax.data.build import console_progress

    with console_progress(f"build {name}") as progress:
        print(run(name, source, out, config, overwrite=overwrite, progress=progress, say=_note))


def stats(directory: Positional[Path]) -> None:
    """Compute the statistics of built records again

    Args:
        directory: the folder of the records, as `sarjax data build` prints it.
    """
    from sarjax.data.build import console_progress
    from sarjax.data.statistics import write

    with console_progress("statistics") as progress:
        print(write(directory, progress=progress))


def show_data(
    name: Positional[str],
    config: str = "",
    data_dir: str = "",
    split: str = "train",
    tiles: int = 8,
    out: Path = Path("tiles.png"),
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Show a data set: a sheet of tiles and labels, and its classes

    Args:
        name: which data set, or the folder of its records.
        config: a configuration of the builder ("" = its default).
        data_dir: where built records are ("" = $SARJAX_DATA_DIR, else ~/sarjax_data).
        split: which split.
        tiles: how many tiles to draw.
        out: the PNG to write.
        json: print JSON instead of text.
    """
    from sarjax.data.store import open_dataset, open_directory
    from sarjax.reports.sheet import class_histogram, sheet

    dataset = open_directory(name) if Path(name).is_dir() else open_dataset(name, config, data_dir)
    sheet(dataset, split, out, tiles)
    rows = class_histogram(dataset)
    if json:
        _print_json({"name": dataset.spec.name, "fingerprint": dataset.fingerprint, "classes": rows})
    else:
        print(f"{dataset.spec.name}: " + ", ".join(f"{n} {s}" for s, n in dataset.statistics.tiles.items()) + " tiles")
        for row in rows:
            print(f"  {row['class']:<14} {row['share']:8.3%}  {row['pixels']:>14,}")
    _note(f"written: {out}")


def synthesize(out: Path, scenes: int = 6, size: str = "1024x1024", seed: int = 0, dates: Literal[1, 2] = 1) -> None:
    """Make plausible optical and SAR scenes with labels, in WHU-OPT-SAR's format

    Args:
        out: the folder to make.
        scenes: how many.
        size: WxH in pixels.
        seed: the same seed makes the same scenes.
        dates: 2 adds a second date, with seasonal change and parcels that change class.
    """
    from sarjax.data.build import console_progress
    from sarjax.data.synthesis import synthesize as run

    try:
        width, height = (int(n) for n in size.lower().split("x"))
    except ValueError as e:
        raise UserError(f"--size is {size!r}; WxH in pixels, such as 1024x1024, is accepted.") from e
    with console_progress("synthesize") as progress:
        print(run(out, scenes, (width, height), seed, dates, progress=progress))


# ------------------------------------------------------------------------------------------------------------- others


def models(size: int = 256, classes: int = 7, channels: int = 3, json: FlagCreatePairsOff[bool] = False) -> None:
    """List the networks: parameters, memory, operations

    Args:
        size: side of the input in pixels.
        classes: number of classes.
        channels: input channels.
        json: print JSON instead of a table.
    """
    _devices(1)
    from sarjax.models.cost import model_table

    rows = model_table(size=size, classes=classes, channels=channels)
    if json:
        _print_json(rows)
        return
    print(f"{'network':<14}{'parameters':>14}{'memory MB':>12}{'Flops G':>10}{'XLA GFLOP':>12}{'XLA peak MiB':>14}")
    for row in rows:
        print(
            f"{row['name']:<14}{row['parameters']:>14,}{row['memory_mb']:>12.3f}{row['flops'] / 1e9:>10.4f}"
            f"{row['xla_flops'] / 1e9:>12.3f}{row['xla_peak_bytes'] / 2**20:>14.1f}"
        )


def _recipes(args: Sequence[str]) -> None:
    """List the recipes"""
    from sarjax.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"  {name:<20} {(recipe.__doc__ or '').strip().splitlines()[0]}")


def demo(out: Path = Path("sarjax-demo"), seed: int = 0) -> None:
    """Synthesize scenes, train a small network on SAR, evaluate, draw: minutes on two cores

    Args:
        out: the folder for everything that is made; the same command goes on where it stopped.
        seed: of scenes and training.
    """
    _devices()
    from sarjax.demo import run

    run(out, seed, say=_note)


Verb = Callable[[Sequence[str]], None]


def _command(name: str, function: Callable[..., None]) -> Verb:
    def call(args: Sequence[str]) -> None:
        tyro.cli(function, prog=f"sarjax {name}", args=args)

    call.__doc__ = function.__doc__
    return call


DATA: dict[str, Verb] = {
    "build": _command("data build", build),
    "stats": _command("data stats", stats),
    "show": _command("data show", show_data),
    "synthesize": _command("data synthesize", synthesize),
}


def _data(args: Sequence[str]) -> None:
    """Build, inspect and synthesize data sets"""
    _dispatch("sarjax data", DATA, args)


VERBS: dict[str, Verb] = {
    "demo": _command("demo", demo),
    "data": _data,
    "recipes": _recipes,
    "train": _train,
    "eval": _command("eval", evaluate),
    "show": _command("show", show),
    "models": _command("models", models),
}


def _dispatch(prog: str, verbs: dict[str, Verb], args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {prog} <verb> [...]\n")
        for name, verb in verbs.items():
            print(f"  {name:<12} {(verb.__doc__ or '').strip().splitlines()[0]}")
        print(f"\n`{prog} <verb> --help` says more.")
        return
    if args[0] == "--version":
        from sarjax import __version__

        print(__version__)
        return
    if args[0] not in verbs:
        raise unknown(f"verb of {prog}", args[0], verbs)
    verbs[args[0]](args[1:])


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: exit code 2 and one line on stderr for what a user can mend."""
    try:
        _dispatch("sarjax", VERBS, list(sys.argv[1:] if args is None else args))
    except UserError as e:
        _note(f"sarjax: {e}")
        sys.exit(2)
    except KeyboardInterrupt:
        _note("sarjax: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
