"""What every picture needs: images for the eye, labels in colour, a figure of its own, a PNG in one move.

matplotlib is imported when something is drawn, never before, and its global state is left alone.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Num

from sarjax.files import write_atomically
from sarjax.spec import DatasetSpec, ModalitySpec

NO_DATA = (255, 0, 255)
IGNORED = (255, 255, 255)


def figure(**options: Any) -> Any:
    """An empty matplotlib figure, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(layout="constrained", **options)
    FigureCanvasAgg(made)
    return made


def save(fig: Any, path: Path, dpi: int = 130) -> Path:
    """The figure as a PNG; UserError, naming the file, where it cannot be written."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def shown_bands(modality: ModalitySpec) -> tuple[int, ...]:
    """The bands to show as red, green and blue: true colour where there is one, else the first three, or the first."""
    names = [b.name.lower() for b in modality.bands]
    if {"red", "green", "blue"} <= set(names):
        return tuple(names.index(c) for c in ("red", "green", "blue"))
    return (0, 1, 2) if len(names) >= 3 else (0,)


def display(
    image: Num[np.ndarray, "h w c"], valid: Integer[np.ndarray, "h w"], modality: ModalitySpec
) -> Integer[np.ndarray, "h w 3"]:
    """One date of one modality as uint8 RGB, `shown_bands` of it, or one in grey; magenta = no data.

    Each band is stretched between its 2nd and 98th percentile, intensity and amplitude on a logarithmic scale.
    """
    keep = np.asarray(valid) > 0
    shown = []
    for number in shown_bands(modality):
        band = np.asarray(image[..., number], np.float64)
        if modality.bands[number].radiometry in ("intensity", "amplitude"):
            band = np.log10(np.maximum(band, 1e-6))
        low, high = np.percentile(band[keep], (2, 98)) if keep.any() else (0.0, 1.0)
        shown.append(np.clip((band - low) / max(high - low, 1e-9), 0, 1) * 255)
    picture = np.round(np.stack(shown * (1 if len(shown) == 3 else 3), -1))
    return np.where(keep[..., None], picture, NO_DATA).astype(np.uint8)


def paint(labels: Integer[np.ndarray, "h w"], spec: DatasetSpec) -> Integer[np.ndarray, "h w 3"]:
    """Class indices as colours of the data set, uint8; what is no class is white."""
    colours = np.full((256, 3), IGNORED, np.uint8)
    colours[: spec.num_classes] = spec.palette
    return colours[np.asarray(labels, np.uint8)]


def legend(fig: Any, spec: DatasetSpec, ignored: bool) -> None:
    """The classes in their colours, below the figure."""
    from matplotlib.patches import Rectangle

    entries = [*zip(spec.class_names, spec.palette, strict=True), *([("ignored", IGNORED)] if ignored else [])]
    patches = [Rectangle((0, 0), 1, 1, fc=np.array(c) / 255, ec="black", lw=0.5, label=n) for n, c in entries]
    fig.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=8, frameon=False)
