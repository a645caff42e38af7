"""Pseudo-labels of a semi-supervised run: how right they are, at boundaries and inside, and what they look like."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from sarjax.data.pipeline import evaluation_batches, labelled_split
from sarjax.errors import UserError, unknown
from sarjax.files import write_atomically
from sarjax.reports.drawing import display, figure, legend, paint, save
from sarjax.reports.run import results_folder
from sarjax.reports.training import open_training
from sarjax.spec import IGNORE_LABEL, DatasetSpec
from sarjax.train.mesh import put_batch, replicated, row_shards

REACH = 3  # pixels on either side of a boundary


def boundary(label: Integer[np.ndarray, "h w"], reach: int = REACH) -> Bool[np.ndarray, "h w"]:
    """Labelled pixels with one of another class within `reach` pixels along rows, columns and diagonals."""
    known = label != IGNORE_LABEL
    size = 2 * reach + 1
    largest = ndimage.maximum_filter(np.where(known, label, 0), size, mode="nearest")
    smallest = ndimage.minimum_filter(np.where(known, label, IGNORE_LABEL), size, mode="nearest")
    return known & (largest != smallest)


class Tally:
    """Counts over tiles: of pixels at boundaries and inside, how many there are, are right and count."""

    def __init__(self, classes: int):
        self.zones = {name: dict.fromkeys(("pixels", "argmax", "reassigned", "counted", "counted_right"), 0)
                      for name in ("boundary", "inside")}  # fmt: skip
        self.truth = np.zeros(classes, np.int64)

    def add(
        self, truth: np.ndarray, argmax: np.ndarray, label: np.ndarray, weight: np.ndarray, covered: np.ndarray
    ) -> None:
        """One tile; covered: where the head has data, outside of which nothing is counted."""
        known = covered & (truth != IGNORE_LABEL)
        edge = known & boundary(truth)
        self.truth += np.bincount(truth[known], minlength=len(self.truth))
        for name, where in (("boundary", edge), ("inside", known & ~edge)):
            zone, counted = self.zones[name], where & (weight > 0)
            zone["pixels"] += int(where.sum())
            zone["argmax"] += int((where & (argmax == truth)).sum())
            zone["reassigned"] += int((where & (label == truth)).sum())
            zone["counted"] += int(counted.sum())
            zone["counted_right"] += int((counted & (label == truth)).sum())

    def rows(self) -> dict[str, dict[str, float | None]]:
        """Shares of each zone and of both: `argmax` and `reassigned` that are right, `counted` (weight above 0), and
        `counted_right` among those.
        """
        total = {key: sum(zone[key] for zone in self.zones.values()) for key in self.zones["inside"]}
        out = {}
        for name, zone in {**self.zones, "all": total}.items():
            n, counted = zone["pixels"], zone["counted"]
            shares = {key: zone[key] / n if n else None for key in ("argmax", "reassigned", "counted")}
            out[name] = {"pixels": n, **shares, "counted_right": zone["counted_right"] / counted if counted else None}
        return out


def report_pseudo(
    run: Path,
    *,
    head: str = "",
    tiles: int = 6,
    batches: int = 8,
    checkpoint: str = "best",
    data_dir: str = "",
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], tuple[Path, Path]]:
    """Writes RUN/reports/pseudo-<head>.png and .json; returns the latter's content and both paths.

    Of the tiles whose labels the run may not learn from, as its inference and memory label them: as many batches as
    asked for, evenly spread over the tiles, each of as many rows as the run's unlabelled ones in a step and transported
    for itself, unmasked. tiles: how many are drawn.
    UserError for a run without pseudo-labels.
    """
    for what, value in (("--tiles", tiles), ("--batches", batches)):
        if value < 1:
            raise UserError(f"{what} is {value}, but should be a whole number from 1.")
    training = open_training(run, checkpoint, data_dir, say)
    method, dataset, experiment = training.method, training.dataset, training.config.experiment
    if method.pseudo is None:
        raise UserError(
            f"{run} makes no pseudo-labels (method {experiment.method.NAME!r}); a run of method dllr on few labels is "
            "accepted."
        )
    head = head or next(iter(method.heads))
    if head not in method.heads:
        raise unknown(f"head of {run}", head, method.heads)
    split = dataset.split("train")
    free = labelled_split(len(split), experiment.data.labelled, experiment.data.labelled_seed)[1]
    rows = max(round(s.rows * experiment.batch_size) for s in method.streams.values() if s.kind == "unlabelled")
    size = rows + -rows % row_shards(training.mesh)
    wanted = min(len(free), batches * size)
    chosen = [int(free[i]) for i in np.linspace(0, len(free) - 1, wanted).round().astype(int)]
    shown = {chosen[i] for i in np.linspace(0, wanted - 1, min(tiles, wanted)).round().astype(int)}

    pseudo = jax.jit(lambda p, s, m, b: method.pseudo(p, s, m, b)[head], out_shardings=replicated(training.mesh))
    tally, errors, pictures = Tally(dataset.spec.num_classes), [], []
    asked = None
    for first, batch in enumerate(evaluation_batches([split[i] for i in chosen], size)):
        kept = batch["row_valid"] > 0
        for name in dataset.spec.modality_names:  # rows that fill the batch up are no pixels to transport
            batch[f"{name}_valid"] = batch[f"{name}_valid"] * kept[:, None, None, None]
        found = jax.device_get(pseudo(training.state.params, training.state.stats, training.rest.memory,
                                      put_batch(training.mesh, batch)))  # fmt: skip
        errors.append(float(found.error))
        asked = np.asarray(found.asked)
        for row in np.flatnonzero(kept):
            position = chosen[first * size + row]
            truth = batch["label"][row]
            tally.add(truth, found.argmax[row], found.label[row], found.weight[row], found.covered[row])
            if position in shown:
                pictures.append((position, found.argmax[row], found.label[row], found.weight[row]))
    seen = tally.truth / max(1, tally.truth.sum())
    content = {
        "run": str(run),
        "checkpoint": training.checkpoint,
        "head": head,
        "tiles": [split.name(i) for i in chosen],
        "boundary_reach": REACH,
        "zones": tally.rows(),
        "transport_error": {"mean": float(np.mean(errors)), "largest": max(errors)},
        "class_mass": {
            name: {"asked": float(a), "truth": float(t)}
            for name, a, t in zip(dataset.spec.class_names, asked, seen, strict=True)
        },
        "class_mass_error": float(np.abs(asked - seen).sum()),
    }
    folder = results_folder(run, "reports")
    png, path = (folder / f"pseudo-{head}.{kind}" for kind in ("png", "json"))
    draw(png, pictures, split, dataset.spec, f"{run}, {head}, {training.checkpoint}")
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content, (png, path)


def draw(path: Path, pictures: list[tuple], rows: Any, spec: DatasetSpec, title: str) -> Path:
    """A sheet: per tile each sensor, truth, the likeliest class, the reassigned one, and how much it counts."""
    titles = [*spec.modality_names, "truth", "likeliest", "reassigned", "weight"]
    fig = figure(figsize=(1.9 * len(titles), 1.95 * len(pictures) + 1.0))
    axes = fig.subplots(len(pictures), len(titles), squeeze=False)
    for line, (position, argmax, label, weight) in zip(axes, pictures, strict=True):
        tile = rows[position]
        images = [display(tile[m.name][-1], tile[f"{m.name}_valid"][-1], m) for m in spec.modalities]
        images += [paint(x, spec) for x in (tile["label"], argmax, label)]
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image, interpolation="nearest")
        line[-1].imshow(weight, vmin=0, vmax=1, cmap="gray", interpolation="nearest")
        line[0].set_ylabel(rows.name(position), fontsize=7)
    for ax, name in zip(axes[0], titles, strict=True):
        ax.set_title(name, fontsize=9)
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])
    fig.suptitle(title, fontsize=9)
    legend(fig, spec, ignored=True)
    return save(fig, path, dpi=100)
