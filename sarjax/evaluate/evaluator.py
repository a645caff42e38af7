"""Evaluation: batches in; one pooled confusion matrix, one per tile and histograms of scores out."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64

from sarjax.evaluate.average_precision import average_precision, score_histogram
from sarjax.evaluate.confusion import confusion_per_row
from sarjax.evaluate.metrics import PER_CLASS, Metrics, TileMean, metrics, nan_mean, tile_mean
from sarjax.spec import DatasetSpec

Batch = Mapping[str, Array]


class Counts(NamedTuple):
    """Of one batch: a confusion matrix per row, and pooled histograms of scores, None where they are not counted."""

    confusion: Int[Array, "b k k"]
    scores: Int[Array, "k 2 bins"] | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Confusion matrices (rows = truth) and histograms of scores of a network on a split.

    confusion: (k, k) int64, pooled over all tiles. per_tile: {id: (k, k) int64}, in the order of first appearance;
    they add up to `confusion`. scores: (k, 2, bins) int64, pooled, as `score_histogram` has them, None where they were
    not counted. What is derived from them is never stored.
    """

    confusion: Int64[np.ndarray, "k k"]
    per_tile: Mapping[int, Int64[np.ndarray, "k k"]]
    scores: Int64[np.ndarray, "k 2 bins"] | None = None

    def metrics(self, spec: DatasetSpec) -> Metrics:
        """Of the pooled matrix: each pixel counts the same. See `sarjax.evaluate.metrics.metrics`."""
        return metrics(self.confusion, spec.macro_classes)

    def tile_mean(self) -> TileMean:
        """Per-class F1 and IoU of each tile, averaged over tiles: each tile that holds the class counts the same."""
        return tile_mean(list(self.per_tile.values()), len(self.confusion))

    def average_precision(self) -> Float64[np.ndarray, " k"]:
        """Per class, over all pixels; nan for a class that no pixel is of, and throughout without `scores`."""
        return np.full(len(self.confusion), np.nan) if self.scores is None else average_precision(self.scores)

    def mean_average_precision(self, spec: DatasetSpec) -> float:
        """Over the macro classes, those where it is undefined left out."""
        return nan_mean(self.average_precision()[list(spec.macro_classes)])

    def scalars(self, spec: DatasetSpec) -> dict[str, float]:
        """What a logger plots, nan where undefined.

        Pooled: "pixel_accuracy", "kappa", "fwiou", "miou", "macro_precision", "macro_recall", "macro_f1", "map",
        and by class "iou/<class>", "f1/...", "precision/...", "recall/...", "ap/...". Means over tiles:
        "tile_mean_iou/<class>", "tile_mean_f1/<class>".
        """
        pooled, tiles, ap = self.metrics(spec), self.tile_mean(), self.average_precision()
        out = {"pixel_accuracy": pooled.oa, "kappa": pooled.kappa, "fwiou": pooled.fwiou, "miou": pooled.macro["iou"]}
        out |= {f"macro_{name}": pooled.macro[name] for name in ("precision", "recall", "f1")}
        out["map"] = self.mean_average_precision(spec)
        for index, name in enumerate(spec.class_names):
            out |= {f"{metric}/{name}": float(getattr(pooled, metric)[index]) for metric in PER_CLASS}
            out |= {
                f"ap/{name}": float(ap[index]),
                f"tile_mean_iou/{name}": float(tiles.iou[index]),
                f"tile_mean_f1/{name}": float(tiles.f1[index]),
            }
        return out


def make_count_step(
    predict: Callable[[Any, Any, Batch], Float[Array, "b h w k"]], num_classes: int
) -> Callable[[Any, Any, Batch], Counts]:
    """(params, stats, batch) -> Counts in int32, a pure function: jit it with shardings of your own.

    predict: (params, stats, batch) -> logits, as a method's head has it. A batch without `row_valid` has no padding.
    """

    def count_step(params, stats, batch):
        logits, row_valid = predict(params, stats, batch), batch.get("row_valid")
        confusion = confusion_per_row(logits, batch["label"], row_valid, num_classes)
        return Counts(confusion, score_histogram(logits, batch["label"], row_valid))

    return count_step


def evaluate(count: Callable[[Batch], Counts], batches: Iterable[Batch]) -> Evaluation:
    """Adds up `count(batch)` over batches, e.g. `partial(jit(make_count_step(...)), params, stats)`.

    A batch has `id` and, if it may be padded, `row_valid`, besides what `count` reads. Rows with `row_valid` 0 are
    left out (of the scores by `count` itself); rows that share an id add up. Sums are int64 on the host: int32 would
    overflow at 2^31 pixels, which a split of large scenes has, and float32 would stop counting at 2^24. Every process
    of a multi-process run gets the whole result.

    Raises:
      ValueError: there is not a single batch.
    """
    per_tile: dict[int, np.ndarray] = {}
    scores: Any = None

    def add(counts, batch):
        nonlocal scores
        confusion = on_host(counts.confusion).astype(np.int64)
        if counts.scores is not None:
            found = on_host(counts.scores).astype(np.int64)
            scores = found if scores is None else scores + found
        ids = on_host(batch["id"])
        valid = on_host(batch["row_valid"]) if "row_valid" in batch else np.ones(len(ids))
        for matrix, tile, keep in zip(confusion, ids.tolist(), valid, strict=True):
            if keep:
                per_tile[tile] = per_tile[tile] + matrix if tile in per_tile else matrix
        return confusion.shape[-1]

    pending = None
    for batch in batches:
        # One step behind, so that the device never waits for the host.
        counts = count(batch)
        if pending is not None:
            add(*pending)
        pending = counts, {name: batch[name] for name in ("id", "row_valid") if name in batch}
    if pending is None:
        raise ValueError("there is nothing to evaluate: no batches")
    num_classes = add(*pending)
    pooled = np.sum([*per_tile.values(), np.zeros((num_classes, num_classes), np.int64)], axis=0)
    return Evaluation(pooled, per_tile, scores)


def on_host(x: Any) -> np.ndarray:
    """An array as numpy, also where its parts lie with several processes: all of them get the whole."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
