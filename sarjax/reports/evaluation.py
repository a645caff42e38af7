"""An evaluation on paper: table, CSV, JSON, confusion matrix, panels of tiles, and a run's curves.

Everything is drawn from `Evaluation` or from a run's own files, so anyone can draw it again. matplotlib is imported
when something is drawn, never before.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Num
from rich import box
from rich.table import Table

from sarjax.evaluate.evaluator import Evaluation
from sarjax.evaluate.metrics import PER_CLASS, nan_mean
from sarjax.files import write_atomically
from sarjax.reports.drawing import display, figure, legend, paint, save
from sarjax.spec import IGNORE_LABEL, DatasetSpec

COLUMNS = ("class", "pixels", *PER_CLASS, "ap", "tile_mean_f1", "tile_mean_iou", "tiles")


def to_dict(evaluation: Evaluation, spec: DatasetSpec) -> dict[str, Any]:
    """All metrics and counts as plain JSON values; what is undefined is None. `from_dict` reads the counts back."""
    pooled, tiles, ap = evaluation.metrics(spec), evaluation.tile_mean(), evaluation.average_precision()
    per_class = {
        name: {
            "pixels": int(pooled.support[i]),
            **{metric: _plain(getattr(pooled, metric)[i]) for metric in PER_CLASS},
            "ap": _plain(ap[i]),
            "tile_mean_f1": _plain(tiles.f1[i]),
            "tile_mean_iou": _plain(tiles.iou[i]),
            "tiles": int(tiles.tiles[i]),
        }
        for i, name in enumerate(spec.class_names)
    }
    return {
        "dataset": spec.name,
        "macro_classes": [spec.class_names[i] for i in spec.macro_classes],
        "pooled": {
            "pixel_accuracy": _plain(pooled.oa),
            "kappa": _plain(pooled.kappa),
            "fwiou": _plain(pooled.fwiou),
            "map": _plain(evaluation.mean_average_precision(spec)),
            "macro": {name: _plain(v) for name, v in pooled.macro.items()},
            "macro_zero": {name: _plain(v) for name, v in pooled.macro_zero.items()},
        },
        "classes": per_class,
        "confusion": evaluation.confusion.tolist(),
        "per_tile": {str(tile): matrix.tolist() for tile, matrix in evaluation.per_tile.items()},
        "scores": None if evaluation.scores is None else evaluation.scores.tolist(),
    }


def from_dict(d: Mapping[str, Any]) -> Evaluation:
    """The evaluation whose `to_dict` is d; d may be from before there were scores."""
    per_tile = {int(tile): np.asarray(matrix, np.int64) for tile, matrix in d["per_tile"].items()}
    scores = d.get("scores")
    return Evaluation(
        np.asarray(d["confusion"], np.int64), per_tile, None if scores is None else np.asarray(scores, np.int64)
    )


def write_json(path: Path, evaluation: Evaluation, spec: DatasetSpec) -> None:
    """`to_dict` as a file, written atomically."""
    write_atomically(path, (json.dumps(to_dict(evaluation, spec)) + "\n").encode())


def read_json(path: Path) -> Evaluation:
    """The evaluation that `write_json` wrote."""
    return from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def write_csv(path: Path, evaluation: Evaluation, spec: DatasetSpec) -> None:
    """A line per class and one, "macro", of the averages over the macro classes; empty cells are undefined.

    Written atomically. precision to iou: one pooled confusion matrix. ap: average precision over all pixels.
    tile_mean_*: means over the `tiles` tiles that hold the class in truth or prediction.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in _rows(evaluation, spec):
        writer.writerow(["" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in row])
    write_atomically(path, text.getvalue().encode())


def table(evaluation: Evaluation, spec: DatasetSpec, title: str = "") -> Table:
    """A rich table of the metrics per class and their macro averages; the caption holds what is not per class."""
    pooled = evaluation.metrics(spec)
    caption = (
        f"pixel accuracy {_four(pooled.oa)}   kappa {_four(pooled.kappa)}   mIoU {_four(pooled.macro['iou'])}   "
        f"fwIoU {_four(pooled.fwiou)}\nprecision to IoU: one confusion matrix over {len(evaluation.per_tile)} tiles; "
        "AP: average precision over all pixels; tile F1, tile IoU: means over the tiles that hold the class"
    )
    excluded = [name for i, name in enumerate(spec.class_names) if i not in spec.macro_classes]
    if excluded:
        caption += f"; macro without {', '.join(excluded)}"
    out = Table(title=title or spec.name, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("class", "pixels", "precision", "recall", "F1", "IoU", "AP", "tile F1", "tile IoU", "tiles"):
        out.add_column(column, justify="left" if column == "class" else "right", no_wrap=True)
    for row in _rows(evaluation, spec):
        out.add_row(*(v if isinstance(v, str) else _count(v) if isinstance(v, int) else _four(v) for v in row))
    return out


def _rows(evaluation: Evaluation, spec: DatasetSpec) -> list[list[Any]]:
    d = to_dict(evaluation, spec)
    pooled, tiles, chosen = d["pooled"], evaluation.tile_mean(), list(spec.macro_classes)
    macro = [*(pooled["macro"][name] for name in PER_CLASS), pooled["map"]]
    macro += [_plain(nan_mean(x[chosen])) for x in (tiles.f1, tiles.iou)]
    return [
        *([name, *(values[column] for column in COLUMNS[1:])] for name, values in d["classes"].items()),
        ["macro", None, *macro, len(evaluation.per_tile)],
    ]


def _plain(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _four(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else f"{x:.4f}"


def confusion_png(path: Path, confusion: Integer[np.ndarray, "k k"], class_names: Sequence[str]) -> None:
    """The confusion matrix: colour = share of the true class (rows add up to 1), text = that share and the count."""
    from matplotlib import colormaps

    k = len(class_names)
    support = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, support, out=np.full((k, k), np.nan), where=support > 0)
    fig = figure(figsize=(2.2 + 0.95 * k, 1.4 + 0.8 * k))
    ax = fig.subplots()
    colours = colormaps["Blues"].with_extremes(bad="#eeeeee")
    shown = ax.imshow(share, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for i in range(k):
        for j in range(k):
            text = (
                f"{_count(confusion[i, j])}"
                if np.isnan(share[i, j])
                else f"{share[i, j]:.3f}\n{_count(confusion[i, j])}"
            )
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.55 else "black")
    ax.set_xticks(range(k), class_names, rotation=45 if k > 3 else 0, ha="right" if k > 3 else "center")
    ax.set_yticks(range(k), class_names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("truth")
    fig.colorbar(shown, ax=ax, label="share of the true class", fraction=0.05)
    save(fig, path)


def _count(n: int) -> str:
    n = int(n)
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= max(size, 10_000):
            return f"{n / size:.1f} {unit}"
    return f"{n:,}"


def panels(
    path: Path,
    tiles: Sequence[Mapping[str, Num[np.ndarray, "..."]]],
    predictions: Mapping[str, Sequence[Integer[np.ndarray, "h w"]]],
    spec: DatasetSpec,
    row_names: Sequence[str] = (),
) -> None:
    """A row per tile: the images of every modality and date that it holds, the truth, and each prediction.

    Images as `drawing.display` shows them.

    Args:
      path: of the PNG.
      tiles: rows of a batch, without the batch axis: `<modality>` (t, h, w, c), `<modality>_valid`, `label` (h, w).
      predictions: {title: class indices (h, w) per tile}.
      spec: of the data set: modalities, class names, colours.
      row_names: written beside the rows, e.g. tile ids.
    """
    columns = [
        (name, date) for name in spec.modality_names if name in tiles[0] for date in range(tiles[0][name].shape[0])
    ]
    titles = [name if spec.dates == 1 else f"{name}, date {date + 1}" for name, date in columns]
    titles += ["truth", *predictions]
    height = max(tile["label"].shape[0] / tile["label"].shape[1] for tile in tiles)
    fig = figure(figsize=(1.9 * len(titles) + 0.3, 1.9 * height * len(tiles) + 0.8))
    axes = fig.subplots(len(tiles), len(titles), squeeze=False)
    for number, (tile, line) in enumerate(zip(tiles, axes, strict=True)):
        pictures = [
            display(tile[name][date], tile[f"{name}_valid"][date], spec.modality(name)) for name, date in columns
        ]
        pictures += [paint(labels, spec) for labels in (tile["label"], *(p[number] for p in predictions.values()))]
        for ax, picture, title in zip(line, pictures, titles, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if number == 0:
                ax.set_title(title, fontsize=9)
        if row_names:
            line[0].set_ylabel(str(row_names[number]), fontsize=9)
    legend(fig, spec, any((tile["label"] == IGNORE_LABEL).any() for tile in tiles))
    save(fig, path)


def curves(path: Path, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Training loss, and metrics on the validation split, over steps.

    rows: of metrics.jsonl, in order: training rows have `loss`, evaluations `val/...`; None (not finite) is a gap.
    Shown of the latter: mIoU, pixel accuracy and the IoU per class, pooled.
    """
    fig = figure(figsize=(10, 3.6))
    left, right = fig.subplots(1, 2)
    loss = _series(rows, "loss")
    left.plot(*loss, color="0.75", lw=1)
    if len(loss[0]) >= 10:
        width = max(3, len(loss[0]) // 20)
        left.plot(*_running_mean(*loss, width), color="C0", lw=1.6, label=f"mean of {width} rows")
        left.legend(frameon=False, fontsize=8)
    left.set_title("training loss", fontsize=10)
    names = [k for row in rows for k in row if k.startswith("val/iou/")]
    shown = {"val/miou": "mIoU", "val/pixel_accuracy": "pixel accuracy"}
    shown |= {name: f"IoU {name.removeprefix('val/iou/')}" for name in dict.fromkeys(names)}
    for name, label in shown.items():
        x, y = _series(rows, name)
        if len(x):
            strong = name in ("val/miou", "val/pixel_accuracy")
            right.plot(x, y, marker=".", lw=1.8 if strong else 1, ls="-" if strong else "--", label=label)
    if right.lines:
        right.set_ylim(0, 1)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        right.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=right.transAxes)
    right.set_title("validation, pooled", fontsize=10)
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    if title:
        fig.suptitle(title, fontsize=11)
    save(fig, path)


def _series(rows, name):
    found = [(row["step"], row[name]) for row in rows if name in row]
    x, y = (np.array([r[i] for r in found], np.float64) for i in (0, 1))
    return x, y


def _running_mean(x, y, width):
    known = ~np.isnan(y)
    x, y = x[known], y[known]
    if len(y) < width:
        return x, y
    return x[width - 1 :], np.convolve(y, np.ones(width) / width, mode="valid")
