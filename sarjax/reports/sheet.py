"""A look at a built data set: `sarjax data show NAME` draws tiles and classes on one sheet."""

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sarjax.errors import UserError
from sarjax.spec import IGNORE_LABEL, DatasetSpec, ModalitySpec

if TYPE_CHECKING:
    from sarjax.data.store import Dataset

IGNORED_COLOUR = (0, 0, 0)
NO_DATA_COLOUR = (255, 0, 255)


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

    Every image is stretched by itself between its 2nd and 98th percentile; magenta = no data, black label = ignored.
    Returns the path of the PNG; raises UserError for an unknown split, n < 1 or a folder that cannot be written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tiles = dataset.split(split)
    if n < 1:
        raise UserError(f"a sheet of {n} tiles cannot be drawn: ask for at least 1.")
    chosen = np.unique(np.linspace(0, len(tiles) - 1, min(n, len(tiles))).round().astype(int))
    spec = dataset.spec
    panels = [(m, t) for m in spec.modalities for t in range(spec.dates)]
    columns, rows = len(panels) + 1, len(chosen)
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows + 1.1 + 0.28 * spec.num_classes), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.2 * rows, 1.1 + 0.28 * spec.num_classes])
    axes = top.subplots(rows, columns, squeeze=False)
    for r, i in enumerate(chosen):
        tile = tiles[i]
        images = [render(m, tile[m.name][t], tile[f"{m.name}_valid"][t]) for m, t in panels]
        for ax, image in zip(axes[r], [*images, colour(spec, tile["label"])], strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
        axes[r][0].set_ylabel(tiles.name(int(i)), fontsize=6)
    for ax, (m, t) in zip(axes[0], panels, strict=False):
        date = f", date {t + 1}" if spec.dates > 1 else ""
        ax.set_title(f"{m.name}{date}\n{', '.join(m.bands[b].name for b in shown_bands(m))}", fontsize=8)
    axes[0][-1].set_title("label", fontsize=8)
    _histogram(bottom.subplots(), dataset, split)
    return _save(figure, Path(out_png))


def render(modality: ModalitySpec, image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 for the eye from one acquisition (h, w, c): three bands, or one in grey; stretched."""
    picked = image[..., list(shown_bands(modality))].astype(np.float32)
    seen = valid > 0
    if seen.any():
        low, high = np.percentile(picked[seen], (2, 98), axis=0)
        picked = (picked - low) / np.maximum(high - low, 1e-6)
    out = (np.clip(picked, 0, 1) * 255).round().astype(np.uint8)
    out = np.repeat(out, 3, -1) if out.shape[-1] == 1 else out
    out[~seen] = NO_DATA_COLOUR
    return out


def shown_bands(modality: ModalitySpec) -> tuple[int, ...]:
    """The bands to show as red, green and blue: true colour where there is one, else the first three, or the first."""
    names = [b.name.lower() for b in modality.bands]
    if {"red", "green", "blue"} <= set(names):
        return tuple(names.index(c) for c in ("red", "green", "blue"))
    return (0, 1, 2) if len(names) >= 3 else (0,)


def colour(spec: DatasetSpec, label: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8: `label` (h, w) in the data set's palette, ignored pixels black."""
    table = np.zeros((256, 3), np.uint8)
    table[: spec.num_classes] = spec.palette
    table[IGNORE_LABEL] = IGNORED_COLOUR
    return table[label]


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


def _save(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; the folder must exist and be writable.") from e
    finally:
        temporary.unlink(missing_ok=True)
    return path
