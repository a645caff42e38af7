"""Small scenes to damage: three classes, two sensors, and lakes that look like water."""

from pathlib import Path

import fake_data
import numpy as np
from PIL import Image

from sarjax.data.doctor import render
from sarjax.data.layout import Layout, Scene, WaterCheck
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

TILE, GAP = 32, 9
WATER = 2
LABELS = {0: 255, 10: 0, 20: 1, 30: WATER}
SPEC = DatasetSpec(
    "toy",
    (
        ModalitySpec("sar", (BandSpec("VV", "amplitude"),), no_data=0, smallest_gap=GAP),
        ModalitySpec("optical", tuple(BandSpec(n, "reflectance") for n in ("green", "nir")), no_data=0),
    ),
    (ClassSpec("field", (1, 1, 1)), ClassSpec("town", (2, 2, 2)), ClassSpec("water", (0, 0, 9))),
)


class Toy:
    """A source of small scenes: lakes are wide and bright in green, all else is bright in nir."""

    def __init__(self, folder: Path, names=("a", "b", "c", "d"), size=(100, 130), ending="tif"):
        self.folder, self.ending = folder, ending
        self.names, self.arrays = names, {}
        for i, name in enumerate(names):
            rng = np.random.default_rng(i)
            w, h = size
            label = (10 + 10 * fake_data.blocks(rng, (h, w), 3, 40)).astype(np.uint8)
            label[-20:, -20:], label[:20, :20], label[:20, -20:] = 10, 20, 30  # each class in each scene
            label[0, :7] = 0
            sar = rng.integers(1, 200, (h, w), dtype=np.uint8)
            green, nir = rng.integers(60, 80, (2, h, w), dtype=np.uint8)
            nir = np.where(label == 30, nir - 30, nir + 30).astype(np.uint8)
            self.arrays[name] = {"sar": sar, "optical": np.stack([green, nir], -1), "label": label}
            for kind in self.arrays[name]:
                self.write(kind, name)

    def path(self, kind: str, name: str) -> Path:
        # PNGs have no two bands of their own: the optical image stays a TIFF.
        return self.folder / kind / f"{name}.{self.ending if kind != 'optical' else 'tif'}"

    def write(self, kind: str, name: str, image: np.ndarray | None = None) -> Path:
        path = self.path(kind, name)
        image = self.arrays[name][kind] if image is None else image
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.fromarray(image).save(path)
        else:
            fake_data.write_tiff(path, image)
        return path

    def layout(self, **changes) -> Layout:
        scenes = tuple(
            Scene(n, {kind: (self.path(kind, n),) for kind in ("sar", "optical")}, self.path("label", n))
            for n in self.names
        )
        splits = dict(zip(self.names, ("train", "train", "val", "test"), strict=False))
        given = {
            "scenes": scenes,
            "labels": LABELS,
            "splits": splits,
            "tile": TILE,
            "water": WaterCheck("optical", 0, 1, WATER),
        }
        return Layout(SPEC, **given | changes)


def found(report, kind=None):
    """(kind, file or scene) of the problems."""
    return [(p.kind, Path(p.where).name) for p in report.problems if kind in (None, p.kind)]


def only(report):
    """The one problem that there is."""
    assert len(report.problems) == 1, render(report)
    return report.problems[0]


def histogram(labels) -> tuple[tuple[int, ...], int]:
    """Pixels per class, and ignored ones."""
    stored = np.concatenate([label.ravel() for label in labels])
    return tuple(int((stored == value).sum()) for value in (10, 20, 30)), int((stored == 0).sum())
