"""Evaluation: batches in, one pooled confusion matrix and one per tile out."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int64

from sarjax.evaluate.confusion import confusion_per_row
from sarjax.evaluate.metrics import Metrics, TileMean, metrics, tile_mean
from sarjax.spec import DatasetSpec

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Confusion matrices (rows = truth) of a network on a split.

    confusion: (k, k) int64, pooled over all tiles. per_tile: {id: (k, k) int64}, in the order of first appearance;
    they add up to `confusion`. What is derived from them is never stored.
    """

    confusion: Int64[np.ndarray, "k k"]
    per_tile: Mapping[int, Int64[np.ndarray, "k k"]]

    def metrics(self, spec: DatasetSpec) -> Metrics:
        """Of the pooled matrix: each pixel counts the same. See `sarjax.evaluate.metrics.metrics`."""
        return metrics(self.confusion, spec.macro_classes)

    def tile_mean(self) -> TileMean:
        """Per-class F1 and IoU of each tile, averaged over tiles: each tile that holds the class counts the same."""
        return tile_mean(list(self.per_tile.values()), len(self.confusion))

    def scalars(self, spec: DatasetSpec) -> dict[str, float]:
        """What a logger plots, nan where undefined.

        Pooled: "pixel_accuracy", "kappa", "fwiou", "miou", "macro_precision", "macro_recall", "macro_f1",
        "iou/<class>", "f1/<class>". Means over tiles: "tile_mean_iou/<class>", "tile_mean_f1/<class>".
        """
        pooled, tiles = self.metrics(spec), self.tile_mean()
        out = {"pixel_accuracy": pooled.oa, "kappa": pooled.kappa, "fwiou": pooled.fwiou, "miou": pooled.macro["iou"]}
        out |= {f"macro_{name}": pooled.macro[name] for name in ("precision", "recall", "f1")}
        for index, name in enumerate(spec.class_names):
            out |= {f"iou/{name}": float(pooled.iou[index]), f"f1/{name}": float(pooled.f1[index])}
            out |= {
                f"tile_mean_iou/{name}": float(tiles.iou[index]),
                f"tile_mean_f1/{name}": float(tiles.f1[index]),
            }
        return out


def make_count_step(
    predict: Callable[[Any, Any, Batch], Float[Array, "b h w k"]], num_classes: int
) -> Callable[[Any, Any, Batch], Int[Array, "b k k"]]:
    """(params, stats, batch) -> (b, k, k) int32, a pure function: jit it with shardings of your own.

    predict: (params, stats, batch) -> logits, as a method's head has it. A batch without `row_valid` has no padding.
    """

    def count_step(params, stats, batch):
        logits = predict(params, stats, batch)
        return confusion_per_row(logits, batch["label"], batch.get("row_valid"), num_classes)

    return count_step


def evaluate(count: Callable[[Batch], Int[Array, "b k k"]], batches: Iterable[Batch]) -> Evaluation:
    """Adds up `count(batch)` -> (b, k, k) over batches, e.g. `partial(jit(make_count_step(...)), params, stats)`.

    A batch has `id` and, if it may be padded, `row_valid`, besides what `count` reads. Rows with `row_valid` 0 are
    left out; rows that share an id add up. Sums are int64 on the host: int32 would overflow at 2^31 pixels, which a
    split of large scenes has, and float32 would stop counting at 2^24. Every process of a multi-process run gets the
    whole result.

    Raises:
      ValueError: there is not a single batch.
    """
    per_tile: dict[int, np.ndarray] = {}

    def add(counts, batch):
        counts = on_host(counts).astype(np.int64)
        ids = on_host(batch["id"])
        valid = on_host(batch["row_valid"]) if "row_valid" in batch else np.ones(len(ids))
        for matrix, tile, keep in zip(counts, ids.tolist(), valid, strict=True):
            if keep:
                per_tile[tile] = per_tile[tile] + matrix if tile in per_tile else matrix
        return counts.shape[-1]

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
    return Evaluation(pooled, per_tile)


def on_host(x: Any) -> np.ndarray:
    """An array as numpy, also where its parts lie with several processes: all of them get the whole."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
