"""A run as its training left it: what looks into a training needs more than what is deployed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sarjax.config import Config, Mesh
from sarjax.data.store import Dataset
from sarjax.methods.record import Method, Rest
from sarjax.reports.run import data_of
from sarjax.train import teacher as teachers
from sarjax.train.loop import make_method
from sarjax.train.mesh import make_mesh
from sarjax.train.optimizer import make_optimizer
from sarjax.train.run import newest_whole, read_config
from sarjax.train.state import abstract_state


class Training(NamedTuple):
    """checkpoint: "best/STEP" or "checkpoints/STEP", of which `state` and `rest` are."""

    config: Config
    dataset: Dataset
    mesh: jax.sharding.Mesh
    method: Method
    state: Any
    rest: Rest
    checkpoint: str


def open_training(run: Path, checkpoint: str, data_dir: str, say: Callable[[str], None]) -> Training:
    """The run at its best on val or at its last; UserError for data other than its own."""
    config = read_config(run)
    dataset = data_of(run, config, "train", data_dir)
    mesh = make_mesh(Mesh())
    folders = ("best", "checkpoints") if checkpoint == "best" else ("checkpoints",)
    checkpoints, step = newest_whole(run, folders, say)
    taught = (run / "teacher").is_dir()
    known = teachers.describe(run / "teacher", config.experiment.precision) if taught else None
    method, _, _ = make_method(config, dataset, known, run, 0)
    experiment = config.experiment
    optimizer = make_optimizer(experiment.optimizer)
    abstract = abstract_state(method, optimizer, experiment.seed, experiment.optimizer.ema > 0, mesh)
    state, _ = checkpoints.restore_step(step, abstract)
    rest = Rest(teachers.load(run, mesh) if taught else None, state.stats, state.memory)
    return Training(config, dataset, mesh, method, state, rest, f"{checkpoints.directory.name}/{step}")
