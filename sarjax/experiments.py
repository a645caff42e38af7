"""Tables: runs their rows, goes on where it stopped, aggregates seeds and compares (`sarjax reproduce`).

WORKDIR/<data>/ <row>-<seed>/ (runs)  table.json  table.md  intervals.json, and for made-up scenes scenes/  records/
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sarjax import config as configs
from sarjax import recipes
from sarjax.config import Config
from sarjax.data.build import build, builder_class, console_progress
from sarjax.data.store import Dataset, find, open_dataset
from sarjax.data.synthesis import synthesize
from sarjax.errors import UserError, unknown
from sarjax.files import write_atomically
from sarjax.machine import sharers, visible_cores
from sarjax.recipes.tables import ABOUT, TABLES, Row, Table, all_rows, check_names, on, shown
from sarjax.reports.comparison import markdown
from sarjax.reports.rows import (
    as_its_row,
    best_checkpoint,
    collect,
    compared,
    read_object,
    read_record,
    read_result,
    vouch,
    write_record,
)
from sarjax.reports.run import evaluate_run
from sarjax.signals import Stopped, termination_raises
from sarjax.train import teacher as teachers
from sarjax.train.loop import make_method, train
from sarjax.train.run import newest_whole, read_manifest, resolve

SCENES, SIZE = 20, (1024, 1024)  # of made-up scenes: 14 to train on, 2 to validate, 4 to test
EVALUATIONS = 20  # of a run on val, from which the best checkpoint is chosen
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be run, and where.

    chosen: rows in the order in which they run; the table shows every row that has results. adapt: changes each row's
    configuration last.
    """

    paper: str
    tables: tuple[Table, ...]
    chosen: tuple[Row, ...]
    data: str
    folder: Path
    seeds: int = 3
    preset: str = ""
    data_dir: str = ""
    test: bool = False
    adapt: Callable[[Config], Config] = lambda config: config

    @property
    def rows(self) -> dict[str, Row]:
        return all_rows(self.tables)

    def config(self, row: Row, seed: int = 0) -> Config:
        """UserError where the row's recipe does not exist."""
        config = self.adapt(on(recipes.find(row.recipe), self.data, self.preset))
        return dataclasses.replace(
            config,
            experiment=dataclasses.replace(
                config.experiment,
                seed=seed,
                data=dataclasses.replace(config.experiment.data, labelled_seed=seed if row.draws else 0),
            ),
            execution=dataclasses.replace(config.execution, data_dir=self.data_dir),
        )

    def run(self, row: str, seed: int) -> Path:
        return self.folder / f"{row}-{seed}"

    def known_configs(self) -> dict[str, Config]:
        """Of the paper's rows whose recipes exist."""
        found = {}
        for row in self.rows.values():
            with contextlib.suppress(UserError):
                found[row.name] = self.config(row)
        return found


class Outcome(NamedTuple):
    """What `reproduce` leaves: the document of table.json, what failed ({run: sentence}), whether it was stopped."""

    document: dict[str, Any]
    failures: dict[str, str]
    stopped: bool


def make_plan(
    paper: str,
    workdir: Path,
    *,
    data: str = "",
    rows: Sequence[str] = (),
    seeds: int = 3,
    preset: str = "",
    epochs: float = 0.0,
    labelled: float = 0.0,
    data_dir: str = "",
    test: bool = False,
) -> Plan:
    """The plan of `paper` (a key of `TABLES`) on `data` ("" = the paper's own); UserError for unknown names and
    impossible numbers.

    rows: which ("" = all), with the teachers that they need. epochs: of every row instead of its own (0 = its own),
    counted in all training tiles, however few of them are labelled. labelled: the share of labelled tiles of every row
    that has only some (0 = its own).
    """
    if paper not in TABLES:
        raise unknown("paper", paper, TABLES)
    data = data or TABLES[paper][0].data
    everything = all_rows(TABLES[paper])
    wanted = set(rows or everything)
    for name in rows:
        if name not in everything:
            raise unknown(f"row of {paper}", name, everything)
    for name in reversed(everything):  # a teacher comes before its student
        if name in wanted and everything[name].teacher:
            wanted.add(everything[name].teacher)
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, but should be a whole number from 1.")
    if not 0 <= epochs < math.inf:
        raise UserError(f"--epochs is {epochs}, but should be a number above 0, or 0 for each row's own.")
    if labelled and not 0 < labelled < 1:
        raise UserError(f"--labelled is {labelled}, but should be a share between 0 and 1, or 0 for each row's own.")
    folder = workdir / data
    if data == "synthetic":
        if data_dir:
            raise UserError(
                f"--data-dir {data_dir} does not go with --data synthetic, whose records are made in "
                f"{folder / 'records'}; leave it out."
            )
        data_dir = str(folder / "records")

    def adapt(config: Config) -> Config:
        e = config.experiment
        share = labelled if labelled and e.data.labelled < 1 else e.data.labelled
        length = (epochs or e.epochs * e.data.labelled) / share
        if epochs or share != e.data.labelled:
            e = dataclasses.replace(e, data=dataclasses.replace(e.data, labelled=share), epochs=length, steps=0)
        return dataclasses.replace(config, experiment=e)

    chosen = tuple(row for name, row in everything.items() if name in wanted)
    check_names(data, preset)
    for row in chosen:
        if row.recipe in recipes.RECIPES:
            on(recipes.find(row.recipe), data, preset)
    tables = tuple(dataclasses.replace(t, metrics=shown(t, data)) for t in TABLES[paper])
    return Plan(paper, tables, chosen, data, folder, seeds, preset, data_dir, test, adapt)


def host_devices(plan: Plan) -> int:
    """CPU devices for all runs: as many as runs that are there have, else one per core that batches can be cut over."""
    for manifest in sorted(plan.folder.glob("*/manifest.json")):
        with contextlib.suppress(UserError):  # a damaged one is named when its run's turn comes
            if fixed := read_manifest(manifest.parent).get("host_devices", 0):
                return fixed
    experiments = [config.experiment for config in plan.known_configs().values()]
    rows = math.gcd(*(max(1, e.batch_size // max(1, e.accumulate)) for e in experiments)) or 1
    return sharers(rows, visible_cores())


def reproduce(plan: Plan, *, say: Say = print) -> Outcome:
    """Runs what is not done, all chosen rows with seed 0 first, then with seed 1, ...; writes the table after each.

    A run that fails is noted with its sentence, and the others go on; those that it should teach fail with it.
    SIGTERM saves the run that is under way and returns. UserError, before anything runs, where records are missing.
    """
    if plan.data == "synthetic":
        _make_records(plan, say)
    datasets = _open_all(plan)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {plan.folder}: {e.strerror}; a writable --workdir would be accepted.") from e
    failures: dict[str, str] = {}
    jobs = [(row, seed) for seed in range(plan.seeds) for row in plan.chosen]
    stopped = False
    try:
        with termination_raises():
            for number, (row, seed) in enumerate(jobs, 1):
                run = plan.run(row.name, seed)
                say(f"[{number}/{len(jobs)}] {run.name}")
                try:
                    _finish(plan, row, seed, datasets, failures, say)
                    for split in ("val", "test") if plan.test and row.test else ("val",):
                        _ensure_evaluated(run, split, plan.data_dir, say)
                except (UserError, jax.errors.JaxRuntimeError) as e:  # the latter: out of memory, most of all
                    failures[run.name] = next(iter(str(e).splitlines()), type(e).__name__)
                    say(f"{run.name} failed: {failures[run.name]}")
                jax.clear_caches()  # a compiled step is of no use to the next run
                write_table(plan, datasets, failures)
    except Stopped:
        stopped = True
        say("stopped by signal; the same command goes on from there")
    return Outcome(write_table(plan, datasets, failures), failures, stopped)


def _key(config: Config) -> tuple[str, str]:
    return config.experiment.data.name, config.experiment.data.config


def _open_all(plan: Plan) -> dict[tuple[str, str], Dataset]:
    """The data sets of the chosen rows."""
    known = plan.known_configs()
    keys = {_key(known[row.name]) for row in plan.chosen if row.name in known}
    return {key: open_dataset(*key, plan.data_dir) for key in sorted(keys)}


def _make_records(plan: Plan, say: Say) -> None:
    """Scenes and records of `--data synthetic`, the same everywhere, where they are not there yet."""
    known = plan.known_configs()
    for name, config in sorted({_key(known[row.name]) for row in plan.chosen if row.name in known}):
        if find(name, config, plan.data_dir) is None:
            say(f"{SCENES} made-up scenes of {SIZE[0]}x{SIZE[1]} pixels and their records, once, in {plan.folder}")
            dates = builder_class(name).spec_of(config).dates
            scenes = plan.folder / ("scenes" if dates == 1 else f"scenes_{dates}")
            with console_progress("synthesize") as progress:
                synthesize(scenes, SCENES, SIZE, 0, dates, progress=progress)
            with console_progress("build") as progress:
                build(name, scenes, plan.data_dir, config, progress=progress, say=say)


def _finish(
    plan: Plan,
    row: Row,
    seed: int,
    datasets: Mapping[tuple[str, str], Dataset],
    failures: Mapping[str, str],
    say: Say,
) -> None:
    """Trains a run to its last step, from where it is.

    UserError as `train`, and for a run that is not as its row says; Stopped where a signal ended it.
    """
    run, config = plan.run(row.name, seed), plan.config(row, seed)
    dataset = datasets[_key(config)]
    teacher, copied = plan.run(row.teacher, seed) if row.teacher else None, run / "teacher"
    if teacher is not None and teacher.name in failures:
        if not copied.is_dir():
            raise UserError(f"its teacher {teacher.name} failed, and without it there is nothing to learn from.")
        teacher = None  # the copy teaches
    resolved = resolve(run, config, dataset)
    as_its_row(read_manifest(run))
    source = copied if copied.is_dir() else teacher
    known = teachers.describe(source, resolved.experiment.precision) if source else None
    schedule = make_method(resolved, dataset, known, run, 0)[1]
    record = read_record(run)
    if _last_step(run) < schedule.steps:
        began = time.monotonic()
        try:
            config = _with_cadence(config, schedule.steps, schedule.steps_per_epoch)
            state = train(config, run, teacher=teacher, dataset=dataset, say=say)
        finally:
            if (run / "config.json").exists():
                record["seconds"] = record.get("seconds", 0.0) + time.monotonic() - began
                write_record(run, record)
        if int(state.step) < schedule.steps:
            raise Stopped
    if record.get("step") != schedule.steps or "best" not in record:
        checkpoints, step = newest_whole(run, ("checkpoints",), say)
        leaves = jax.tree.leaves(checkpoints.stored(step)["params"])
        facts = {"step": step, "parameters": sum(math.prod(leaf.shape) for leaf in leaves)}
        best = checkpoints.position(step)["best"]
        write_record(run, record | facts | {"best": best and best["step"]})


def _with_cadence(config: Config, steps: int, steps_per_epoch: float) -> Config:
    """Evaluated `EVALUATIONS` times, or once an epoch where that is rarer, whatever the data set's size."""
    e = config.execution
    every = math.ceil(max(steps_per_epoch, steps / EVALUATIONS))
    execution = dataclasses.replace(
        e,
        evaluate_every=e.evaluate_every or every,
        checkpoint_every=e.checkpoint_every or every,
        log_every=e.log_every and max(e.log_every, steps // 100),
    )
    return dataclasses.replace(config, execution=execution)


def _last_step(run: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    try:
        return newest_whole(run, ("checkpoints",), lambda line: None)[1]
    except UserError:
        return 0


def _ensure_evaluated(run: Path, split: str, data_dir: str, say: Say) -> None:
    """Evaluates the best checkpoint of a finished run, unless the results that are there are its own.

    UserError where what the run says was best on val is not there, or not whole.
    """
    checkpoint = best_checkpoint(run, read_record(run))
    if read_result(run, split, checkpoint) is not None:
        return
    checkpoints, step = newest_whole(run, ("best", "checkpoints"), say)
    found = f"{checkpoints.directory.name}/{step}"
    if found != checkpoint:
        raise UserError(
            f"{run / checkpoint}, its best on val, is not there or not whole ({found} is); with {run} removed it is "
            "trained again."
        )
    say(f"{run.name}: {checkpoint} on {split}")
    evaluate_run(run, split=split, data_dir=data_dir, say=say)
    vouch(run, split, checkpoint)


def write_table(plan: Plan, datasets: Mapping[tuple[str, str], Dataset], failures: Mapping[str, str]) -> dict[str, Any]:
    """Writes table.json and table.md from what the runs left; returns the former's document."""
    file = plan.folder / "intervals.json"
    known = read_object(file)
    before = len(known)
    document = _document(plan, datasets, failures, known)
    if len(known) > before:
        write_atomically(file, json.dumps(known, indent=1, allow_nan=False) + "\n")
    write_atomically(plan.folder / "table.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomically(plan.folder / "table.md", markdown(document))
    return document


def _document(
    plan: Plan,
    datasets: Mapping[tuple[str, str], Dataset],
    failures: Mapping[str, str],
    known: dict[str, Any],
) -> dict[str, Any]:
    expected = plan.known_configs()
    baseline = plan.tables[0].baseline
    setting = []
    if baseline in expected:
        recipe = recipes.find(plan.rows[baseline].recipe)
        setting = configs.difference(recipe.experiment, expected[baseline].experiment)

    def of_these_records(row: Row, seed: int) -> Config:
        config = plan.config(row, seed)
        fingerprint = datasets[_key(config)].fingerprint if _key(config) in datasets else ""
        data = dataclasses.replace(config.experiment.data, fingerprint=fingerprint)
        return dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, data=data))

    wanted = {name: functools.partial(of_these_records, plan.rows[name]) for name in expected}
    found = collect(plan.folder, wanted, baseline)
    return {
        "paper": plan.paper,
        "data": plan.data,
        "about": ABOUT[plan.data],
        "preset": plan.preset,
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "setting": setting,
        "records": found.records,
        "machines": found.machines,
        "tested": [row.name for row in plan.rows.values() if row.test],
        "failures": dict(failures),
        "left_out": found.left_out,
        "tables": [compared(table, found, table.data == plan.data, known) for table in plan.tables],
        "rows": {name: facts | {"teacher": plan.rows[name].teacher or None} for name, facts in found.rows.items()},
    }
