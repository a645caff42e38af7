"""Verbs of a run: recipes, train, eval, show, report."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli import common, distributed
from sarjax.cli.common import note, print_json
from sarjax.errors import UserError
from sarjax.files import check_is_local
from sarjax.machine import sharers, visible_cores


def recipes_verb(args: Sequence[str]) -> None:
    """List the recipes"""
    from sarjax.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"  {name:<20} {(recipe.__doc__ or '').strip().splitlines()[0]}")


def train_verb(args: Sequence[str]) -> None:
    """Train a recipe; the same command goes on where a run stopped"""
    with distributed.said_once(tuple(args)):
        start = _training(args)
    if start is not None:
        start()


def _training(args: Sequence[str]) -> Callable[[], None] | None:
    """What trains as `args` say; None where they ask for help."""
    from sarjax import recipes
    from sarjax.recipes import tables

    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            print(
                "usage: sarjax train RECIPE --workdir RUN [--data NAME] [--preset NAME] [--network NAME] "
                "[--method NAME] [any dotted field]\n"
            )
            print("RECIPE may also be a run's config.json: its values are then the defaults of a run of the same data.")
            print("`sarjax train RECIPE --help` lists the fields; the recipes are:\n")
            recipes_verb([])
            return None
        raise UserError(f"sarjax train needs a recipe first: {', '.join(recipes.RECIPES)}, or a run's config.json.")
    name, rest = args[0], list(args[1:])
    data, rest = _taken("data", rest, tables.DATA)
    preset, rest = _taken("preset", rest, recipes.PRESETS)
    default = _default(name, data, preset)
    for part in ("network", "method"):
        default, rest = _exchanged(default, part, rest)
    experiment_type, execution_type = type(default.experiment), type(default.execution)

    def train(
        workdir: Path,
        experiment: Annotated[experiment_type, tyro.conf.arg(name="")] = default.experiment,
        execution: Annotated[execution_type, tyro.conf.arg(name="")] = default.execution,
        teacher: Path | None = None,
        init_from: Path | None = None,
        extend_steps: int = 0,
        distributed: Literal["auto", "off", "on"] = "auto",
    ) -> Callable[[], None]:
        """Train a recipe; the same command goes on where a run stopped.

        Args:
            workdir: the run's directory; made when it is not there.
            experiment: identity of the run.
            execution: how and where it runs; may change between starts.
            teacher: directory of the trained run that teaches this one.
            init_from: directory of a run whose parameters a new run starts from.
            extend_steps: go on to this many steps: the one allowed change of an existing run.
            distributed: train as one of the processes that SLURM, Open MPI, Kubernetes, a TPU slice or launch/local.py
                started. auto: where there is more than one. on: an error where no launcher is found. off: never.
        """
        import dataclasses

        from sarjax.config import validate

        config = dataclasses.replace(default, experiment=experiment, execution=execution)
        validate(config)
        check_is_local(workdir, "a run needs a folder, which all machines share where there are several")
        if data == "synthetic" and not execution.data_dir:
            raise UserError(
                "--data synthetic needs --data-dir, the folder of records that `sarjax data build whu_opt_sar` made of "
                "made-up scenes."
            )
        for what, path in (("--teacher", teacher), ("--init-from", init_from)):
            known = what == "--teacher" and (workdir / "teacher").is_dir()  # copied: its own run may be gone
            if path is not None and not known and not (path / "config.json").is_file():
                raise UserError(f"{what} {path} holds no run; a directory made by `sarjax train` is accepted.")
        return partial(_train, config, workdir, distributed, teacher, init_from, extend_steps)

    recipe = recipes.RECIPES.get(default.recipe.split("+")[0])
    doc = (recipe and recipe.__doc__) or ""
    return tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(train), prog=f"sarjax train {name}", description=doc, args=rest
    )


def _train(config: Any, workdir: Path, mode: str, teacher: Path | None, init_from: Path | None, extend: int) -> None:
    place, say = distributed.join(mode)
    with distributed.ending_all(place):
        common.devices(_host_devices(workdir, config, place))
        from sarjax.train.loop import train

        train(config, workdir, teacher=teacher, init_from=init_from, extend_steps=extend, say=say)


def _exchanged(default: Any, part: str, args: list[str]) -> tuple[Any, list[str]]:
    """`default` with the network or method that `--network NAME` or `--method NAME` names, and the other arguments.

    What both have from a common parent stays, such as encoder, width and weights; the rest is as the named one has it
    by default: its own output stride, and fields that may mean something else under the same name.
    """
    import dataclasses

    from sarjax.options import MethodOptions, NetworkOptions

    known = {"network": NetworkOptions, "method": MethodOptions}[part].registry()
    named, rest = _taken(part, args, known)
    if not named:
        return default, rest
    old, kind = getattr(default.experiment, part), known[named]
    common = next(parent for parent in type(old).__mro__ if issubclass(kind, parent))
    kept = {f.name for f in dataclasses.fields(common)} - {"output_stride"}
    new = kind(**{name: getattr(old, name) for name in kept})
    experiment = dataclasses.replace(default.experiment, **{part: new})
    return dataclasses.replace(default, experiment=experiment), rest


def _taken(option: str, args: list[str], known: Iterable[str]) -> tuple[str, list[str]]:
    """The name that `--option NAME` gives ("" where it is not there), one of `known`, and the other arguments."""
    from sarjax.errors import unknown

    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(f"--{option}=") else [arg])]
    if f"--{option}" not in args:
        return "", args
    if args.count(f"--{option}") > 1:
        raise UserError(f"--{option} is given more than once; one name is accepted.")
    at = args.index(f"--{option}")
    name = args[at + 1] if at + 1 < len(args) else ""
    if name not in known:
        raise unknown(option, name, known)
    return name, args[:at] + args[at + 2 :]


def _default(name: str, data: str, preset: str) -> Any:
    """The configuration that a training starts from: of a recipe, on other data as tables put it there, or of a
    config.json.
    """
    from sarjax import config, recipes
    from sarjax.recipes import tables

    if not name.endswith(".json"):
        return tables.on(recipes.find(name), data, preset) if data else recipes.find(name, preset)
    for option, value in (("data", data), ("preset", preset)):
        if value:
            raise UserError(f"--{option} {value} changes a recipe; {name} says all of a run and takes none.")
    return config.read(Path(name))


def _host_devices(workdir: Path, config: Any, place: distributed.Place) -> int:
    """CPU devices of this process. Of the run: as at its first start; else as asked; else one per core that the batch
    can be cut over.
    """
    from sarjax.train.run import read_manifest

    asked = config.execution.host_devices
    fixed = read_manifest(workdir).get("host_devices", 0)
    if fixed and asked and fixed != asked:
        raise UserError(
            f"{workdir} runs on {fixed} host devices since its first start, not {asked}: leave --host-devices out, or "
            "use another --workdir."
        )
    if total := fixed or asked:
        if total % place.processes:
            why = f"{workdir} runs on {total} since its first start" if fixed else f"--host-devices is {total}"
            raise UserError(
                f"{why}: {place.processes} processes cannot share {total} host devices equally; a number of processes "
                "that divides them is accepted."
            )
        return total // place.processes
    rows = config.experiment.batch_size // max(1, config.experiment.accumulate) // place.processes
    return sharers(rows, visible_cores(place.here))


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
        checkpoint: the best on val (where none was kept, the last, and a line says so), or the last.
        ema: evaluate the running mean of the parameters.
        head: which of the method's heads ("" = its default).
        data_dir: where built records are ("" = as the run was trained, else $SARJAX_DATA_DIR or ~/sarjax_data).
        json: print JSON instead of a table; the written JSON also holds the histograms of scores.
    """
    from sarjax.train.run import read_manifest

    common.devices(read_manifest(run).get("host_devices", 0))
    from sarjax.reports.evaluation import table, to_dict
    from sarjax.reports.run import evaluate_run

    result = evaluate_run(run, split=split, checkpoint=checkpoint, ema=ema, head=head, data_dir=data_dir, say=note)
    if json:
        found = to_dict(result.evaluation, result.spec)
        del found["scores"]  # counts for whoever pools them; the written file holds them
        print_json({"run": str(run), "split": split, "step": result.step} | found)
    else:
        from rich.console import Console

        Console().print(table(result.evaluation, result.spec, f"{run}, {split}, step {result.step}"))
    note(f"written: {', '.join(str(p) for p in result.files)}")


def show(run: Positional[Path], json: FlagCreatePairsOff[bool] = False) -> None:
    """Show a run: what it is, how far it is, its best, its curves

    Args:
        run: the run's directory.
        json: print JSON instead of text.
    """
    from sarjax.reports.run import describe, draw_curves

    facts = describe(run)
    if json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    picture = draw_curves(run)
    if picture:
        note(f"written: {picture}")


def report(
    run: Positional[Path],
    what: Positional[Literal["clusters", "gradients", "pseudo"]],
    split: Literal["train", "val", "test"] = "val",
    tiles: int = 6,
    batches: int = 8,
    head: str = "",
    checkpoint: Literal["best", "last"] | None = None,
    data_dir: str = "",
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Report on a run: its clusters of scenes, its pseudo-labels, or how its loss terms pull at the network

    Args:
        run: the run's directory.
        what: clusters: sizes, mix of classes and nearest tiles of each cluster of scenes. gradients: how strongly each
            term of the objective pulls at the parameters that several of them move, and in which direction. pseudo:
            how right the labels are that it gives to unlabelled training tiles, before and after reassignment.
        split: clusters: whose tiles.
        tiles: clusters: how many tiles of each to draw; pseudo: how many in all.
        batches: gradients: of how many training batches, those that come after the checkpoint; pseudo: of unlabelled
            tiles, evenly spread.
        head: pseudo: of which of the method's heads ("" = its default).
        checkpoint: the best on val (where none was kept, the last, and a line says so), or the last; clusters are
            and pseudo-labels of the best where nothing is said, gradients of the last.
        data_dir: where built records are ("" = as the run was trained, else $SARJAX_DATA_DIR or ~/sarjax_data).
        json: print JSON instead of text.
    """
    from sarjax.train.run import read_manifest

    common.devices(read_manifest(run).get("host_devices", 0))
    if what == "gradients":
        from sarjax.reports.gradients import report_gradients

        pulls, path = report_gradients(
            run, batches=batches, checkpoint=checkpoint or "last", data_dir=data_dir, say=note
        )
        if json:
            print_json([pull._asdict() for pull in pulls])
        else:
            print(f"{'term':<16} {'weight':>7} {'value':>9} {'|gradient|':>11}  cosine with {pulls[0].name}")
            for pull in pulls:
                cosine = "-" if pull.cosine is None else f"{pull.cosine:+.2f}"
                print(f"{pull.name:<16} {pull.factor:>7.3g} {pull.value:>9.4f} {pull.norm:>11.4g}  {cosine}")
        note(f"written: {path}")
        return
    if what == "pseudo":
        from sarjax.reports.pseudo import report_pseudo

        content, files = report_pseudo(
            run,
            head=head,
            tiles=tiles,
            batches=batches,
            checkpoint=checkpoint or "best",
            data_dir=data_dir,
            say=note,
        )
        if json:
            print_json(content)
        else:
            _print_pseudo(content)
        note(f"written: {', '.join(str(p) for p in files)}")
        return
    from sarjax.reports.clusters import report_clusters

    found, files = report_clusters(
        run, split=split, tiles=tiles, checkpoint=checkpoint or "best", data_dir=data_dir, say=note
    )
    if json:
        print_json(found)
    else:
        for cluster in found:
            mix = sorted(cluster["classes"].items(), key=lambda item: -(item[1] or 0))[:3]
            shares = ", ".join(f"{name} {share:.0%}" for name, share in mix if share)
            print(f"cluster {cluster['cluster']:>3}  {cluster['tiles']:>6} tiles ({cluster['share']:6.1%})  {shares}")
    note(f"written: {', '.join(str(p) for p in files)}")


def _print_pseudo(content: dict[str, Any]) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    print(f"{'pixels':<10}{'number':>12}{'likeliest':>11}{'reassigned':>12}{'counted':>9}{'of these right':>16}")
    for name, zone in content["zones"].items():
        shares = [share(zone[key]) for key in ("argmax", "reassigned", "counted", "counted_right")]
        print(f"{name:<10}{zone['pixels']:>12,}" + "{:>11}{:>12}{:>9}{:>16}".format(*shares))
    error = content["transport_error"]
    print("mass of the classes, sums over them:")
    print(f"  |transported - asked| = {error['mean']:.2e} in the mean of the batches, {error['largest']:.2e} at most")
    print(f"  |asked - truth| = {content['class_mass_error']:.4f}")
