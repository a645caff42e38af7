"""Tiny change-detection sets in the real formats: names of folders, endings and modes as the published ones have."""

from pathlib import Path
from typing import NamedTuple

import fake_data
import numpy as np
from PIL import Image

PLAIN = ("A", "B", "label")
SPLITS = {"train": ("1", "2"), "val": ("3",), "test": ("4",)}


class Format(NamedTuple):
    """folders: of both dates and the labels, by their own names. image: ending. label: ending by split."""

    folders: tuple[str, str, str] = PLAIN
    image: str = ".png"
    label: dict[str, str] = dict.fromkeys(SPLITS, ".png")


FORMATS = {
    "levir_cd": Format(),
    "whu_cd": Format(image=".tif", label=dict.fromkeys(SPLITS, ".tif")),
    "clcd": Format(("time1", "time2", "label")),
    "s2looking": Format(("Image1", "Image2", "label")),
    "dsifn": Format(("t1", "t2", "mask"), ".jpg", {"train": ".png", "val": ".png", "test": ".tif"}),
    "sysu_cd": Format(("time1", "time2", "label")),
    "pairs": Format(),
}


class Pair(NamedTuple):
    """What the files of a scene hold: before and after (h, w, 3), label (h, w) of 0 and 255."""

    before: np.ndarray
    after: np.ndarray
    label: np.ndarray

    @property
    def dates(self) -> np.ndarray:
        return np.stack([self.before, self.after])


def pair(name: str, side: int = 256) -> Pair:
    """One scene, of squares of one colour each, which JPEG keeps nearly as they are."""
    rng = np.random.default_rng(list(name.encode()))
    before, after = (np.stack([fake_data.blocks(rng, (side, side), 256) for _ in range(3)], -1) for _ in range(2))
    label = fake_data.blocks(rng, (side, side), 2) * 255
    return Pair(*(array.astype(np.uint8) for array in (before, after, label)))


def write(path: Path, array: np.ndarray) -> Path:
    """As the file's ending says; in JPEG, without averaging colours over neighbours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        fake_data.write_tiff(path, array)
    elif path.suffix == ".jpg":
        Image.fromarray(array).save(path, quality=95, subsampling=0)
    else:
        Image.fromarray(array).save(path)
    return path


def write_set(
    root: Path,
    config: str = "levir_cd",
    flat: bool = False,
    plain: bool = False,
    splits: dict[str, tuple[str, ...]] = SPLITS,
    side: int = 256,
) -> dict[str, Pair]:
    """Writes a set under `root`; what its scenes hold, by the names that a build gives them.

    flat: one folder for all with lists of names, else folders of each split. plain: folders are called A, B and label.
    """
    form, pairs = FORMATS[config], {}
    folders = PLAIN if plain else form.folders
    for split, names in splits.items():
        for name in names:
            scene = name if flat else f"{split}/{name}"
            pairs[scene] = made = pair(scene, side)
            for folder, array in zip(folders, made, strict=True):
                ending = form.label[split] if folder == folders[2] else form.image
                write(root / ("" if flat else split) / folder / f"{name}{ending}", array)
        if flat:
            (root / "list").mkdir(exist_ok=True)
            (root / "list" / f"{split}.txt").write_text("".join(f"{name}.png\n" for name in names))
    return pairs
