"""Training, read from top to bottom: data, run directory, devices, method, state, step, loop."""

import contextlib
import time
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from sarjax import config as configs
from sarjax.config import Config
from sarjax.data.store import Dataset, open_dataset
from sarjax.errors import UserError
from sarjax.evaluate.evaluator import make_count_step
from sarjax.methods import build_method
from sarjax.methods.record import Context, Method, Schedule
from sarjax.models.torchvision import load_encoder
from sarjax.train import teacher as teachers
from sarjax.train.checkpoint import Checkpoints
from sarjax.train.feed import host_tables, make_batches, refreshed, run_evaluation
from sarjax.train.loggers import MetricsFile, TensorBoard, Terminal, summary
from sarjax.train.mesh import abstract_batch, make_mesh, place, put_batch, replicated
from sarjax.train.optimizer import learning_rate, make_optimizer
from sarjax.train.run import claim, environment, extended_to, make_schedule, newest_whole, record_start, resolve
from sarjax.train.state import TrainState, abstract_state, born
from sarjax.train.step import jit_step
from sarjax.train.stop import StopFlag


def train(
    config: Config,
    workdir: Path,
    *,
    teacher: Path | None = None,
    init_from: Path | None = None,
    extend_steps: int = 0,
    dataset: Dataset | None = None,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Trains the run in `workdir`, from its newest whole checkpoint on, and returns the last state.

    teacher: run that teaches this one. init_from: run whose parameters a new run starts from. extend_steps: the
    one allowed change of an existing run. dataset: instead of the one that the configuration names.
    SIGTERM saves a checkpoint and returns early; the same call goes on from there. One that comes too late for that
    goes, once the run is finished, to the handler that was there before.
    """
    # ------------------------------------------------------------------ data
    configs.validate(config)
    execution = config.execution
    data = config.experiment.data
    dataset = dataset or open_dataset(data.name, data.config, execution.data_dir)

    # ------------------------------------------------- devices, configuration
    mesh = make_mesh(execution.mesh)
    config = resolve(workdir, config, dataset)
    experiment = config.experiment

    # ---------------------------------------------------------- method, input
    copied = workdir / "teacher"
    source = copied if copied.is_dir() else teacher
    known = teachers.describe(source, experiment.precision) if source else None
    method, schedule, extended = make_method(config, dataset, known, workdir, extend_steps)
    batches = make_batches(method, dataset, config, mesh)
    optimizer = make_optimizer(experiment.optimizer)
    rate = learning_rate(experiment.optimizer, schedule.steps)

    # ----------------------------------------------------------------- state
    ema = experiment.optimizer.ema
    abstract = abstract_state(method, optimizer, experiment.seed, ema > 0, mesh)

    def first_state() -> TrainState:
        first = with_imported_weights(born(method, optimizer, experiment.seed, abstract), experiment)
        return first if init_from is None else teachers.warm_start(first, init_from, method, dataset.spec, mesh, say)

    # A new run's first state comes before its directory: what is wrong with it leaves nothing behind.
    state = None if (workdir / "config.json").exists() else first_state()
    if teacher is not None and not copied.is_dir():
        newest_whole(teacher, ("best", "checkpoints"), say)  # UserError where it has learnt nothing yet
    with contextlib.ExitStack() as at_end:
        at_end.enter_context(claim(workdir, config, dataset, extended))
        frozen = None
        if teacher is not None:
            teachers.adopt(teacher, workdir, mesh, say=say)
        if source is not None:
            origin = teachers.read_origin(copied)
            say(f"teacher: {origin['run']}, {origin['checkpoint']}")
            frozen = teachers.load(workdir, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=execution.keep, say=say)
        best = Checkpoints(workdir / "best", keep=1, say=say) if keeps_best(config, dataset) else None
        managers = [m for m in (checkpoints, best) if m is not None]
        restored = checkpoints.restore(abstract)
        position: dict[str, Any] = {"best": None}
        if restored is not None:
            state, position = restored
        elif state is None:
            state = first_state()
        batches.tables = host_tables(method, state.memory)
        start = int(state.step)
        if start >= schedule.steps:
            say(f"{workdir} is trained to its last step, {start}; --extend-steps N would go on.")
            for manager in managers:
                manager.close()
            return state
        if best is not None:
            best.forget_after(start)  # of steps that this run has yet to take
            say_lost_best(position, best, say)
        taught_by = teachers.read_origin(copied)["fingerprint"] if source is not None else None
        record_start(workdir, environment(mesh), dataset.fingerprint, start, init_from, taught_by, say)

        stop = at_end.enter_context(StopFlag(checkpoints))
        for manager in managers:
            at_end.callback(manager.close)

        # ------------------------------------------------------------------- step
        jitted = jit_step(method, experiment, rate, abstract)
        example = abstract_batch(mesh, batches[start], jax.process_count())
        with jax.set_mesh(mesh):  # what is drawn by row asks for it, to stay where its rows are
            lowered = jitted.lower(abstract, frozen, example)
        began = time.monotonic()
        compiled = lowered.compile()
        for line in summary(state, compiled, config, schedule, method, len(batches.tiles), mesh):
            say(line)
        say(f"compiled in {time.monotonic() - began:.1f} s; " + (f"resuming at step {start}" if start else "starting"))
        head = next(iter(method.heads.values()))
        count = jax.jit(make_count_step(head.predict, dataset.spec.num_classes), out_shardings=replicated(mesh))

        # ------------------------------------------------------------------- loop
        evaluate_every = execution.evaluate_every or schedule.cadence
        checkpoint_every = execution.checkpoint_every or schedule.cadence
        leader = jax.process_index() == 0
        terminal = Terminal(start, schedule.steps, experiment.batch_size, silent=not leader)
        loggers: list[Any] = [terminal]
        if leader:
            loggers.append(MetricsFile(workdir / "metrics.jsonl", start))
            if execution.tensorboard:
                loggers.append(TensorBoard(workdir / "events", start))
        for logger in loggers:
            at_end.callback(logger.close)
        feed = batches.iterate(start, schedule.steps, execution.prefetch)
        at_end.callback(lambda: feed.close())  # the one that is there then
        previous: Any = {}
        exceeded: set[str] = set()
        for s in range(start, schedule.steps):
            state, metrics = compiled(state, frozen, put_batch(mesh, next(feed)))
            done, last = s + 1, s + 1 == schedule.steps
            terminal.advance(done)

            # Asked of the step before: its numbers are there while this one still runs.
            check_finite(previous, done - 1, execution.max_bad_steps, checkpoints)
            previous = metrics
            if last or (execution.log_every and done % execution.log_every == 0):
                values = {k: float(v) for k, v in metrics.items()}
                for logger in loggers:
                    logger.write(done, values)
                for name in say_exceeded(values, method, done, exceeded, terminal.say):
                    exceeded.add(name)

            if method.refresh is not None and schedule.epochs(done) > schedule.epochs(s):
                state = refreshed(method, state, dataset, config, mesh, schedule.epochs(done))
                batches.tables = host_tables(method, state.memory)
                feed.close()
                feed = batches.iterate(done, schedule.steps, execution.prefetch)

            if "val" in dataset.statistics.tiles and (last or done % evaluate_every == 0):
                evaluation = run_evaluation(count, head, state.params, state.stats, dataset, "val", config, mesh)
                values = {f"val/{k}": v for k, v in evaluation.scalars(dataset.spec).items()}
                for logger in loggers:
                    logger.write(done, values)
                if best is not None and (position["best"] is None or values["val/miou"] > position["best"]["miou"]):
                    position = {"best": {"step": done, "miou": values["val/miou"]}}
                    best.save(done, state, position)

            stopping = stop.requested(done)
            if last or stopping or done % checkpoint_every == 0:
                if best is not None:
                    best.wait()  # what a checkpoint says was best is whole before it is
                checkpoints.save(done, state, position)
            for manager in managers:
                manager.poll()
            if stopping and not last:
                terminal.say(f"stopped by signal after step {done}; the same command goes on from there")
                stop.obeyed = True
                break
        check_finite(previous, done, execution.max_bad_steps, checkpoints)
    return state


def say_exceeded(
    values: Mapping[str, float], method: Method, step: int, known: Container[str], say: Callable[[str], None]
) -> Iterator[str]:
    """Says what is above its limit, and yields its name, but for the `known`."""
    for name, (limit, sentence) in method.limits.items():
        if name not in known and values.get(name, 0.0) > limit:
            say(f"step {step}: {name} is {values[name]:.3g}, above {limit:g}: {sentence}")
            yield name


def make_method(
    config: Config, dataset: Dataset, teacher: Any, workdir: Path, extend_steps: int
) -> tuple[Method, Schedule, int]:
    """The method, the schedule that it closes over, and the steps that the run was or is extended to (0 = not).

    A schedule needs the streams' rows and a method the schedule, so the method is built a second time with it.
    """
    tiles = len(dataset.split("train"))
    context = Context(config.experiment, dataset.spec, dataset.statistics, Schedule(1, 1, 1), teacher)
    first = next(iter(build_method(context).streams.values()))
    schedule = make_schedule(config.experiment, first, tiles)
    extended = extended_to(workdir, extend_steps, schedule.steps)
    schedule = schedule._replace(steps=extended or schedule.steps)
    return build_method(context._replace(schedule=schedule)), schedule, extended


def keeps_best(config: Config, dataset: Dataset) -> bool:
    """The best on val is kept where the data set has a validation split."""
    return config.execution.keep_best and "val" in dataset.statistics.tiles


def say_lost_best(position: Mapping[str, Any], best: Checkpoints, say: Callable[[str], None]) -> None:
    """Says so where what a resumed run takes for its best on val is not there any more."""
    known = position["best"]
    if known is not None and known["step"] not in best.steps():
        say(
            f"{best.directory.name}/{known['step']}, the best on val so far (mIoU {known['miou']:.4f}), is not there "
            "any more: only a better one takes its place."
        )


def with_imported_weights(state: TrainState, experiment: configs.Experiment) -> TrainState:
    """The encoder's weights read from `network.weights`, where it names a file."""
    if not experiment.network.weights:
        return state
    old = {"params": state.params, "batch_stats": state.stats}
    new = load_encoder(old, Path(experiment.network.weights), experiment.network)
    new = jax.tree.map(lambda value, like: place(value, like.sharding), new, old)
    ema = None if state.ema is None else jax.tree.map(lambda p: p.copy(), new["params"])
    return state.replace(params=new["params"], stats=new["batch_stats"], ema=ema)


def check_finite(metrics: Mapping[str, jax.Array], step: int, limit: int, checkpoints: Checkpoints) -> None:
    """UserError when `limit` steps in a row were skipped."""
    bad = int(metrics["bad_in_a_row"]) if metrics else 0
    if bad >= limit:
        checkpoints.wait()
        steps = checkpoints.steps()
        where = f"{checkpoints.directory}/{steps[-1]}" if steps else "none"
        raise UserError(
            f"stopped at step {step}: loss or gradient were not finite {bad} steps in a row; a lower learning rate or "
            f"--optimizer.clip may help; the last good checkpoint is {where}."
        )
