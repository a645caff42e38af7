"""The record that a method is: pure functions, and what they need. See `Method`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.config import Experiment
from sarjax.models.context import FieldOfView
from sarjax.models.segmenters import Prediction
from sarjax.spec import DatasetSpec, Statistics, Stream

Tree = Any
Batch = Mapping[str, Array]


class Variables(NamedTuple):
    """What a method is born with: trained parameters, running statistics, and memory (banks, queues, tables)."""

    params: Tree
    stats: Tree
    memory: Tree


class Rest(NamedTuple):
    """What the loss reads besides the parameters; `frozen` is the teacher's Variables or None, and never changes."""

    frozen: Tree
    stats: Tree
    memory: Tree


class Term(NamedTuple):
    """A loss term or a metric as `total / weight`: sums over valid pixels or rows.

    Terms of microbatches add up before the one division, so neither accumulation nor padding changes the value.
    factor: the weight of the term in the objective. A weight of 0 makes the term 0.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    factor: Float[Array, ""] | float = 1.0

    def mean(self) -> Float[Array, ""]:
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


class Outputs(NamedTuple):
    """What the loss leaves behind: the next statistics and memory, and metrics to log."""

    stats: Tree
    memory: Tree
    metrics: dict[str, Term]


class Head(NamedTuple):
    """Something that can be deployed.

    requires: the batch keys it reads. predict: (params, stats, batch) -> logits (b, h, w, k). context: how far around
    a pixel it looks, from stored bands to logits, given the statistics that normalise them: what windows of a scene
    are cut by.
    """

    requires: tuple[str, ...]
    predict: Callable[[Tree, Tree, Batch], Float[Array, "b h w k"]]
    context: FieldOfView


class Schedule(NamedTuple):
    """How long a run is: steps in all, tiles of the first stream's pool, and its rows in a step."""

    steps: int
    tiles: int
    rows: int

    @property
    def steps_per_epoch(self) -> float:
        return self.tiles / self.rows

    @property
    def cadence(self) -> int:
        """Steps between evaluations where nobody says how many: an epoch, and at least a hundredth of the run.

        Epochs count labelled tiles: where these are few, an epoch is a few steps.
        """
        return max(1, round(self.steps_per_epoch), self.steps // 100)

    def epochs(self, step: int) -> int:
        """Whole passes over the first stream that are complete before `step`."""
        return step * self.rows // self.tiles


class Method(NamedTuple):
    """One paper as pure functions; the step, the loop, checkpoints and sharding know nothing of papers.

    streams: {name: Stream}; a batch handed to `loss` is {name: plain dict of arrays}.
    init: (key) -> Variables; works under eval_shape, does no I/O.
    loss: (params, Rest, batch, key, step) -> ({name: Term}, Outputs). The objective is the sum of
        factor * total / weight. `batch[stream]["row"]` holds every row's index in the global batch: fold it into
        keys that are drawn per row.
    encode: (params, stats, inputs, train) -> {stride: features}; inputs (b, h, w, c) as the network sees them.
    heads: {name: Head}; the first is the default.
    requires: batch keys that the loss reads; a data set without one of them is refused before the first step.
    refresh: None, or (params, stats, memory, batches, epoch) -> memory, at an epoch's end; `batches` iterates over
        the training split in order, on device, unaugmented, as often as it is asked to.
    teacher: None, or the check that a teacher fits: (Teacher) -> None, raises UserError.
    forward: None, or (params, stats, batch) -> Prediction in inference mode: all that a student may learn from.
    classify: None, or (params, stats, embedding, (h, w)) -> logits of an embedding that `forward` gives, or that
        another network puts in its place.
    pseudo: None, or (params, stats, memory, batch) -> {head: Pseudo}: the labels that it gives to unlabelled rows.
    limits: {metric: (value, sentence)}: a run says the sentence, once, when a logged metric is above the value.
    scenes: None, or (params, stats, batch) -> (b, m): the share of each of m kinds of scene in every tile.
    beside: names of the parameters that are the method's own, not those of the network that is deployed.
    couples: names of what couples the rows of a batch, and so sees only a microbatch under accumulation.
    notes: sentences that a run says before its first step.
    """

    streams: Mapping[str, Stream]
    init: Callable[[jax.Array], Variables]
    loss: Callable[[Tree, Rest, Mapping[str, Batch], jax.Array, jax.Array], tuple[dict[str, Term], Outputs]]
    encode: Callable[[Tree, Tree, Float[Array, "b h w c"], bool], Mapping[int, Float[Array, "b h w c"]]]
    heads: Mapping[str, Head]
    requires: tuple[str, ...]
    refresh: Callable[..., Tree] | None = None
    teacher: Callable[["Teacher"], None] | None = None
    forward: Callable[[Tree, Tree, Batch], Prediction] | None = None
    classify: Callable[[Tree, Tree, Float[Array, "b _ _ c"], tuple[int, int]], Float[Array, "b h w k"]] | None = None
    scenes: Callable[[Tree, Tree, Batch], Float[Array, "b m"]] | None = None
    pseudo: Callable[[Tree, Tree, Tree, Batch], Mapping[str, Any]] | None = None
    limits: Mapping[str, tuple[float, str]] = MappingProxyType({})
    beside: tuple[str, ...] = ()
    couples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Teacher(NamedTuple):
    """A trained method as seen by a student: its functions, configuration and data. Its variables come as `frozen`."""

    method: Method
    experiment: Experiment
    spec: DatasetSpec
    statistics: Statistics


class Context(NamedTuple):
    """What a factory closes over besides its options; `experiment.method` are those options."""

    experiment: Experiment
    spec: DatasetSpec
    statistics: Statistics
    schedule: Schedule
    teacher: Teacher | None = None
