"""Tiles as a PyTorch user reads them: a Dataset of TIFF windows by rasterio, a DataLoader with workers.

Imported only where torch is installed. The one other importer of rasterio: what is compared is not read through ours.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from torch.utils.data import DataLoader, Dataset

from sarjax.bench.input import Cut, checksums

FOLDERS = {"sar": "sar", "optical": "optical", "label": "lbl"}


class Tiles(Dataset):
    """Tile i: {"position", sensor: (c, h, w) uint8, "label": (h, w) uint8, 255 = ignore}.

    alone: each tile is a file of its own; else files are scenes, which stay open.
    """

    def __init__(
        self, folder: Path, alone: bool, cuts: Sequence[Cut], sensors: Sequence[str], labels: Mapping[int, int]
    ):
        self._folder, self._alone, self._cuts, self._keys = folder, alone, cuts, (*sensors, "label")
        self._labels = np.full(256, 255, np.uint8)
        for value, index in labels.items():
            self._labels[value] = index
        self._files: dict[Path, Any] = {}  # of this process: workers open their own

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        tile: dict[str, Any] = {"position": i}
        for key in self._keys:
            pixels = self._read(key, i)
            tile[key] = torch.from_numpy(self._labels[pixels[0]] if key == "label" else pixels)
        return tile

    def _read(self, key: str, i: int) -> np.ndarray:
        if self._alone:
            with rasterio.open(self._folder / FOLDERS[key] / f"{i}.tif") as f:
                return f.read()
        file, row, column, side = self._cuts[i]
        path = self._folder / FOLDERS[key] / file
        if path not in self._files:
            self._files[path] = rasterio.open(path)
        return self._files[path].read(window=Window(column, row, side, side))


def _quiet(worker: int = 0) -> None:
    """That scenes are not georeferenced is known."""
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)


class Windows:
    """A side of `sarjax bench input`: a call is a pass over all tiles, shuffled, onto the device."""

    def __init__(self, folder: Path, alone: bool, cuts: Sequence[Cut], batch: int, sensors: Sequence[str], cores: int):
        from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import LABELS

        _quiet()
        self._cuda = torch.cuda.is_available()
        workers = cores if cores > 1 else 0  # on one core they only pass tiles on
        self._loader = DataLoader(
            Tiles(folder, alone, cuts, sensors, LABELS),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._cuda,
            worker_init_fn=_quiet,
        )

    def __call__(self, what: str) -> Any:
        sums: dict[int, int] = {}
        start = time.perf_counter()
        for batch in self._loader:
            if self._cuda:
                batch = {key: value.cuda(non_blocking=True) for key, value in batch.items()}
            if what == "sums":
                rows = {key: value.cpu().numpy() for key, value in batch.items()}
                images = {key: rows[key].transpose(0, 2, 3, 1) for key in rows if key not in ("position", "label")}
                sums |= checksums(rows["position"], images, rows["label"])
        if self._cuda:
            torch.cuda.synchronize()
        return sums if what == "sums" else time.perf_counter() - start
