"""A run's directory: what it was told (config.json), what it ran on (manifest.json), and what it left.

RUN/ config.json  manifest.json  spec.json  stats.json  metrics.jsonl  events/  checkpoints/  best/  teacher/  lock
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from sarjax import config as configs
from sarjax.config import Config, Experiment
from sarjax.data.pipeline import labelled_split
from sarjax.data.store import Dataset
from sarjax.errors import UserError, unknown
from sarjax.files import file_digest, held, write_atomically
from sarjax.machine import visible_cores
from sarjax.methods import build_method
from sarjax.methods.record import Context, Head, Method, Schedule, Tree
from sarjax.spec import DatasetSpec, Statistics, Stream
from sarjax.train.checkpoint import Checkpoints
from sarjax.train.mesh import infer_sharding

PACKAGES = ("sarjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PRECISIONS = ("float32", "bfloat16")  # of `Experiment.precision`
# What `claim` writes, in this order.
CLAIMED = ("spec.json", "stats.json", "manifest.json", "config.json")
LOCK = "lock"  # held by the process that trains the run
_HALF_WRITTEN = re.compile(rf"\.({'|'.join(map(re.escape, CLAIMED))})\.\d+\.tmp")  # by `write_atomically`


def make_schedule(experiment: Experiment, first: Stream, tiles: int) -> Schedule:
    """Steps of the run and of a pass over its first stream; tiles: of the training split."""
    labelled, rest = labelled_split(tiles, experiment.data.labelled, experiment.data.labelled_seed)
    pool = max(1, len(rest if first.kind == "unlabelled" else labelled))
    rows = max(1, round(first.rows * experiment.batch_size))
    return Schedule(experiment.steps or max(1, round(experiment.epochs * pool / rows)), pool, rows)


def resolve(workdir: Path, config: Config, dataset: Dataset) -> Config:
    """The configuration that the run in `workdir` goes by; writes nothing.

    A new or empty directory takes `config`, and so does one where a start died in `claim`; one of the same experiment
    is continued; UserError, with the difference, for one of another experiment, and for a configuration that was read
    from a run on other records.
    """
    seen, found = config.experiment.data.fingerprint, dataset.fingerprint
    if seen and seen != found:
        raise UserError(
            f"{dataset.directory} has the fingerprint {found}, but the configuration is of a run on {seen}; the "
            "records of that build (--data-dir), or the recipe's name, would be accepted."
        )
    data = dataclasses.replace(config.experiment.data, fingerprint=dataset.fingerprint)
    config = dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, data=data))
    if (workdir / "config.json").exists():
        changed = configs.difference(read_config(workdir).experiment, config.experiment)
        if changed:
            raise UserError(
                f"{workdir} holds another experiment ({'; '.join(changed)}); another --workdir, or the same values, "
                "would be accepted."
            )
    elif workdir.exists() and not (workdir.is_dir() and _unclaimed(workdir)):
        raise UserError(f"{workdir} is not empty and holds no run; an empty or new directory would be accepted.")
    return config


def extended_to(workdir: Path, asked: int, steps: int) -> int:
    """The steps that a run goes to beyond the `steps` of its experiment: as asked now, else as asked before, else 0."""
    before = read_manifest(workdir).get("extended_to", 0)
    if not asked or asked == before:
        return before
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run whose steps could be extended.")
    if asked <= max(before, steps):
        goal = max(before, steps)
        raise UserError(f"--extend-steps {asked} does not extend {workdir}, which goes to step {goal}; more would.")
    return asked


def _unclaimed(workdir: Path) -> bool:
    """Whether a directory is empty, or holds only what a start that died in `claim` leaves."""
    names = {path.name for path in workdir.iterdir()} - {LOCK}
    whole = [name for name in CLAIMED[:-1] if name in names]
    return whole == list(CLAIMED[: len(whole)]) and all(map(_HALF_WRITTEN.fullmatch, names - set(whole)))


@contextlib.contextmanager
def claim(workdir: Path, config: Config, dataset: Dataset, extended: int = 0) -> Iterator[None]:
    """Writes what the run is into its directory, by process 0 while the others wait, and keeps it from other starts.

    UserError where the directory cannot be written to, or another process is training the run.
    """
    sync("resolved")  # nobody asks any more whether there is a run
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(
                    f"cannot write to {workdir}: {e.strerror}; a writable --workdir would be accepted."
                ) from e
            stack.enter_context(held(workdir / LOCK, str(workdir)))
            _describe(workdir, config, dataset, extended)
        sync("claimed")
        yield


def _describe(workdir: Path, config: Config, dataset: Dataset, extended: int) -> None:
    if not (workdir / "config.json").exists() and _unclaimed(workdir):
        for path in workdir.iterdir():  # left by a start that died here: of no run
            if path.name != LOCK:
                path.unlink()
    write_atomically(workdir / "spec.json", dataset.spec.to_json())
    write_atomically(workdir / "stats.json", dataset.statistics.to_json())
    manifest = read_manifest(workdir)
    if extended:
        manifest["extended_to"] = extended
    weights = config.experiment.network.weights
    if weights and "weights_sha256" not in manifest:
        manifest["weights_sha256"] = file_digest(Path(weights))[1]
    manifest.setdefault("tile", list(dataset.tile))
    data = config.experiment.data
    if data.labelled < 1:
        drawn = labelled_split(len(dataset.split("train")), data.labelled, data.labelled_seed)[0].tolist()
        if manifest.setdefault("labelled", drawn) != drawn:
            raise UserError(
                f"{workdir} has learnt from the labels of other tiles than this version of numpy draws from the "
                "same seed; the version with which it began is accepted (manifest.json)."
            )
    write_manifest(workdir, manifest)
    # Last: a directory without it holds no run.
    write_atomically(workdir / "config.json", configs.to_json(config))


def sync(what: str) -> None:
    """Waits until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What decides the last bits of a result."""
    devices = jax.devices()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cores": visible_cores(),
        "mesh": dict(mesh.shape),
    }


def record_start(
    workdir: Path,
    env: dict[str, Any],
    fingerprint: str,
    step: int,
    init_from: Path | None,
    teacher: str | None,
    say: Callable[[str], None],
) -> None:
    """Adds a start to the manifest; says why a resumed run will not be bit-identical, where it will not.

    init_from: run whose parameters the first state has, where this start made one. teacher: its copy's fingerprint.
    """
    if jax.process_index():
        return
    manifest = read_manifest(workdir)
    starts = manifest.setdefault("starts", [])
    if starts and step:
        changed = configs.difference({k: starts[0][k] for k in env}, env)
        if changed:
            say(f"not bit-identical to an uninterrupted run: {'; '.join(changed)}.")
    starts.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "step": step, **env})
    if not step:  # a run that was killed before its first checkpoint begins anew
        manifest.pop("init_from", None)
        if init_from is not None:
            manifest["init_from"] = str(init_from)
    manifest.setdefault("data_fingerprint", fingerprint)
    if teacher is not None:
        manifest.setdefault("teacher", teacher)
    if env["platform"] == "cpu":
        manifest.setdefault("host_devices", env["devices"])
    write_manifest(workdir, manifest)


def read_manifest(workdir: Path) -> dict[str, Any]:
    path = workdir / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is damaged; the file that the run wrote is accepted.")
    return manifest


def write_manifest(workdir: Path, manifest: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_atomically(workdir / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def read_config(workdir: Path) -> Config:
    """The run's config.json; UserError when `workdir` holds no run."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no run (no config.json); a directory made by `sarjax train` is accepted.")
    return configs.read(path)


class Restored(NamedTuple):
    """A trained run, ready to predict: the method's functions and its variables on the mesh."""

    workdir: Path
    config: Config
    spec: DatasetSpec
    statistics: Statistics
    method: Method
    params: Tree
    stats: Tree
    step: int
    checkpoint: str

    def head(self, name: str = "") -> tuple[str, Head]:
        """(name, head) of the method, "" = its first; UserError, with the nearest, for one that it does not have."""
        heads = self.method.heads
        name = name or next(iter(heads))
        if name not in heads:
            raise unknown(f"head of {self.workdir}", name, heads)
        return name, heads[name]

    def at_precision(self, precision: str) -> "Restored":
        """The same parameters in a network that computes in `precision`; UserError for one that there is not."""
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}; {' or '.join(PRECISIONS)} is accepted.")
        experiment = dataclasses.replace(self.config.experiment, precision=precision)
        context = Context(experiment, self.spec, self.statistics, Schedule(self.step, 1, 1))
        return self._replace(
            config=dataclasses.replace(self.config, experiment=experiment),
            method=build_method(context, for_inference=True),
        )


def read_data_description(folder: Path) -> tuple[DatasetSpec, Statistics]:
    """spec.json and stats.json of a run or of its teacher; UserError where they are missing or damaged."""
    try:
        return (
            DatasetSpec.from_json((folder / "spec.json").read_text(encoding="utf-8")),
            Statistics.from_json((folder / "stats.json").read_text(encoding="utf-8")),
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"spec.json or stats.json of {folder} cannot be read ({e}); those of the run are needed."
        ) from e


def newest_whole(workdir: Path, folders: tuple[str, ...], say: Callable[[str], None]) -> tuple[Checkpoints, int]:
    """The newest whole checkpoint of the first folder that holds one; damaged ones are named."""
    found = False
    for folder in filter(Path.is_dir, (workdir / name for name in folders)):
        checkpoints = Checkpoints(folder, say=say, read_only=True)
        for step in reversed(checkpoints.steps()):
            fault = checkpoints.fault(step)
            if fault is None:
                return checkpoints, step
            found = True
            say(f"checkpoint {folder.name}/{step} is damaged: {fault}; trying the one before.")
    if found:
        raise UserError(f"no checkpoint in {workdir} is whole; train the run again.")
    raise UserError(f"{workdir} holds no checkpoint yet; train it first.")


def restore_run(
    workdir: Path, mesh: jax.sharding.Mesh, *, checkpoint: str = "best", ema: bool = False, say=print
) -> Restored:
    """The run's method and parameters for inference; opens no teacher and no data set.

    checkpoint: "best" (on val; where none was kept the last, which is said) or "last". ema: the running mean instead of
    the parameters; UserError where none was kept.
    """
    config = read_config(workdir)
    spec, statistics = read_data_description(workdir)
    if checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint is {checkpoint!r}; best or last are accepted.")
    checkpoints, step = newest_whole(
        workdir, ("best", "checkpoints") if checkpoint == "best" else ("checkpoints",), say
    )
    shapes = checkpoints.stored(step)
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        infer_sharding(mesh, shapes),
    )
    state, _ = checkpoints.restore_step(step, abstract)
    if ema and state["ema"] is None:
        raise UserError(f"{workdir} kept no running mean of its parameters; train with --optimizer.ema above 0.")
    schedule = Schedule(step, 1, 1)
    method = build_method(Context(config.experiment, spec, statistics, schedule), for_inference=True)
    found = f"{checkpoints.directory.name}/{step}"
    if checkpoint == "best" and not found.startswith("best/"):
        say(f"{workdir} kept no checkpoint that was best on val: the last, {found}, is used")
    return Restored(
        workdir,
        config,
        spec,
        statistics,
        method,
        state["ema"] if ema else state["params"],
        state["stats"] or {},
        step,
        found,
    )
