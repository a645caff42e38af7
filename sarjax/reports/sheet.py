"""A look at a built data set: `sarjax data show NAME` draws tiles and classes on one sheet."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sarjax.errors import UserError
from sarjax.reports.drawing import display, figure, paint, save, shown_bands

if TYPE_CHECKING:
    from sarjax.data.store import Dataset


def class_histogram(dataset: "Dataset") -> list[dict[str, Any]]:
    """Per class its name (`class`), `colour`, labelled training `pixels` and their `share` (0 to 1)."""
    spec, pixels = dataset.spec, dataset.statistics.class_pixels
    total = max(sum(pixels), 1)
    return [
        {"class": c.name, "colour": list(c.colour), "pixels": n, "share": n / total}
        for c, n in zip(spec.classes, pixels, strict=True)
    ]


def sheet(dataset: "Dataset", split: str, out_png: str | os.PathLike, n: int = 6) -> Path:
    """Draws `n` tiles, evenly spread over `split`, with their labels, a legend and the shares of the classes.

    Every image is stretched by itself between its 2nd and 98th percentile; magenta = no data, white label = ignored.
    Returns the path of the PNG; raises UserError for an unknown split, n < 1 or a folder that cannot be written to.
    """
    tiles = dataset.split(split)
    if n < 1:
        raise UserError(f"a sheet of {n} tiles cannot be drawn: ask for at least 1.")
    chosen = np.unique(np.linspace(0, len(tiles) - 1, min(n, len(tiles))).round().astype(int))
    spec = dataset.spec
    panels = [(m, t) for m in spec.modalities for t in range(spec.dates)]
    columns, rows = len(panels) + 1, len(chosen)
    fig = figure(figsize=(2.2 * columns, 2.2 * rows + 1.1 + 0.28 * spec.num_classes))
    top, bottom = fig.subfigures(2, 1, height_ratios=[2.2 * rows, 1.1 + 0.28 * spec.num_classes])
    axes = top.subplots(rows, columns, squeeze=False)
    for r, i in enumerate(chosen):
        tile = tiles[i]
        images = [display(tile[m.name][t], tile[f"{m.name}_valid"][t], m) for m, t in panels]
        for ax, image in zip(axes[r], [*images, paint(tile["label"], spec)], strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
        axes[r][0].set_ylabel(tiles.name(int(i)), fontsize=6)
    for ax, (m, t) in zip(axes[0], panels, strict=False):
        date = f", date {t + 1}" if spec.dates > 1 else ""
        ax.set_title(f"{m.name}{date}\n{', '.join(m.bands[b].name for b in shown_bands(m))}", fontsize=8)
    axes[0][-1].set_title("label", fontsize=8)
    _histogram(bottom.subplots(), dataset, split)
    return save(fig, Path(out_png), dpi=120)


def _histogram(ax: Any, dataset: "Dataset", split: str) -> None:
    rows = class_histogram(dataset)
    names = [row["class"] for row in rows]
    bars = ax.barh(names, [row["share"] for row in rows], color=[[c / 255 for c in row["colour"]] for row in rows])
    ax.bar_label(bars, [f"{row['share']:.1%}" for row in rows], fontsize=7, padding=2)
    ax.invert_yaxis()
    ax.set_xlim(0, max(row["share"] for row in rows) * 1.15 or 1)
    ax.tick_params(labelsize=7)
    tiles = ", ".join(f"{dataset.statistics.tiles[name]} {name}" for name in dataset.splits)
    ax.set_xlabel("share of the labelled training pixels", fontsize=7)
    ax.set_title(f"{dataset.spec.name} ({dataset.fingerprint}): {tiles} tiles; above: {split}", fontsize=8)
