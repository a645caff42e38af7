"""Between the records and the step: which arrays, on which devices, in what order."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from sarjax.config import Config, Experiment
from sarjax.data.pipeline import Batches, evaluation_batches, labelled_split
from sarjax.data.store import Dataset
from sarjax.errors import UserError
from sarjax.evaluate.evaluator import Evaluation, evaluate, on_host
from sarjax.methods.record import Head, Method
from sarjax.spec import IGNORE_LABEL
from sarjax.train.mesh import place, put_batch, row_shards
from sarjax.train.state import TrainState


def make_batches(method: Method, dataset: Dataset, config: Config, mesh: jax.sharding.Mesh) -> Batches:
    """The training stream; UserError when its rows do not fit devices or microbatches."""
    experiment = config.experiment
    if any(s.kind == "labelled" for s in method.streams.values()) and not any(dataset.statistics.class_pixels):
        raise UserError(
            f"no pixel of data set {dataset.spec.name!r} is labelled in train, and method {experiment.method.NAME!r} "
            "learns from labels: records with labels would be accepted."
        )
    batches = Batches(
        dataset.split("train", modalities=training_modalities(method, dataset, experiment)),
        method.streams,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        labelled=experiment.data.labelled,
        labelled_seed=experiment.data.labelled_seed,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    data = experiment.data
    drawn = labelled_split(len(batches.tiles), data.labelled, data.labelled_seed)[0] if data.labelled < 1 else ()
    if len(drawn) and not any((batches.tiles[int(i)]["label"] != IGNORE_LABEL).any() for i in drawn):
        raise UserError(
            f"none of the {len(drawn)} tiles that experiment.data.labelled = {data.labelled} draws with seed "
            f"{data.labelled_seed} has a labelled pixel; a larger share or another experiment.data.labelled_seed is "
            "accepted."
        )
    check_shares(batches.rows, np.shape(batches.tiles[0]["label"])[0], mesh.shape, experiment)
    return batches


# XLA (that of jax 0.10) gives wrong gradients of a convolution whose kernel has more rows than the map, once rows of a
# batch and strips of images are both over devices: at stride 32 a 3x3 kernel's map is higher from here on.
LEAST_LINES_IN_STRIPS = 128


def check_shares(rows: Mapping[str, int], height: int, sizes: Mapping[str, int], experiment: Experiment) -> None:
    """UserError when {stream: rows} or the lines of a tile cannot be shared equally by a mesh {axis: devices}."""
    shards = sizes["data"] * sizes["fsdp"]
    unit = shards * experiment.accumulate
    for name, count in rows.items():
        if count % unit or not count:
            raise UserError(
                f"stream {name!r} has {count} rows in a batch, which {shards} devices with {experiment.accumulate} "
                f"microbatches cannot share equally; a multiple of {unit} is accepted."
            )
    height = experiment.augment.crop or height
    if height % sizes["space"]:
        raise UserError(
            f"execution.mesh.space is {sizes['space']}, which does not divide images of {height} lines; a divisor is "
            "accepted."
        )
    if sizes["space"] > 1 and shards > 1 and height < LEAST_LINES_IN_STRIPS:
        raise UserError(
            f"execution.mesh is data={sizes['data']} fsdp={sizes['fsdp']} space={sizes['space']}, but images of "
            f"{height} lines are too small to be cut into strips beside rows: the compiler's gradients would be wrong; "
            f"{LEAST_LINES_IN_STRIPS} lines or more, or space=1, are accepted."
        )


def modalities(keys: tuple[str, ...], dataset: Dataset, who: str) -> tuple[str, ...]:
    """The modalities that batch `keys` belong to; UserError that names `who`, the data set and the missing key."""
    names = dataset.spec.modality_names
    held = {"label", "hidden_label", *names, *(f"{name}_valid" for name in names)}
    for key in keys:
        if key not in held:
            raise UserError(f"{who} needs {key!r}, which data set {dataset.spec.name!r} does not hold: {sorted(held)}.")
    return tuple(name for name in names if name in keys)


def training_modalities(method: Method, dataset: Dataset, experiment: Experiment) -> tuple[str, ...]:
    return modalities(method.requires, dataset, f"method {experiment.method.NAME!r}")


def host_tables(method: Method, memory: Any) -> dict[str, np.ndarray]:
    """Partner tables of the follow streams, copied to the host."""
    names = {stream.table for stream in method.streams.values() if stream.kind == "follow"}
    return {name: on_host(memory[name]) for name in names}


def refreshed(method: Method, state: TrainState, dataset: Dataset, config: Config, mesh: Any, epoch: int) -> TrainState:
    """`state` with its memory rebuilt from the training split."""
    split = dataset.split("train", modalities=training_modalities(method, dataset, config.experiment))
    memory = method.refresh(state.params, state.stats, state.memory, Passes(split, config, mesh), epoch)
    return state.replace(memory=jax.tree.map(lambda new, old: place(new, old.sharding), memory, state.memory))


@dataclasses.dataclass(frozen=True)
class Passes:
    """Each iteration is a pass over `device_batches`."""

    split: Any
    config: Config
    mesh: jax.sharding.Mesh

    def __iter__(self) -> Iterator[Any]:
        return device_batches(self.split, self.config, self.mesh)


def device_batches(split: Any, config: Config, mesh: jax.sharding.Mesh) -> Iterator[Any]:
    rows = config.experiment.batch_size
    rows += -rows % row_shards(mesh)
    numpy = evaluation_batches(split, rows, process=jax.process_index(), processes=jax.process_count())
    return map(partial(put_batch, mesh), numpy)


def run_evaluation(
    count: Any, head: Head, params: Any, stats: Any, tiles: Dataset, split: str, config: Config, mesh: Any
) -> Evaluation:
    """Counts `split` with `count`, the jitted step of one head: training does it on val, `sarjax eval` on either."""
    rows = tiles.split(split, modalities=modalities(head.requires, tiles, "the head"))
    return evaluate(partial(count, params, stats), device_batches(rows, config, mesh))
