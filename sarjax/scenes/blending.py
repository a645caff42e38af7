"""Adding up overlapping windows in memory that depends on the window alone, never on the scene."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Num

from sarjax.raster import Window
from sarjax.scenes.windows import Axis, shares


class Finished(NamedTuple):
    """A part of the scene that no later window touches: where it lies in the scene, and its sums (h, w, k)."""

    part: Window
    values: Num[np.ndarray, "h w k"]


class Blender:
    """Weighted sums of windows that come in row-major order.

    What a window adds to the right of where the next one begins is carried to that one. What it adds below where the
    next row begins is kept on disk until that row comes, a file per column of windows in `folder`: a row of a wide
    scene need not fit in memory.

    dtype: of windows and sums; whole numbers, such as classes, where the overlap covers the radius.
    """

    def __init__(
        self,
        rows: Axis,
        columns: Axis,
        overlap: int,
        radius: int | None,
        channels: int,
        folder: Path,
        dtype: type = np.float32,
    ):
        self.rows, self.columns, self._folder = rows, columns, folder
        self._row_shares = shares(rows, overlap, radius).astype(dtype)
        self._column_shares = shares(columns, overlap, radius).astype(dtype)
        self._carry = np.zeros((rows.length, 0, channels), dtype)

    def add(self, i: int, j: int, values: Num[np.ndarray, "h w k"] | None) -> Finished:
        """Adds window (row i, column j), None = zeros, and returns what is finished by it, cut to the scene."""
        y, x = self.rows.origins[i], self.columns.origins[j]
        if values is None:
            total = np.zeros((self.rows.length, self.columns.length, self._carry.shape[-1]), self._carry.dtype)
        else:
            total = values * self._column_shares[j][:, None]
            total *= self._row_shares[i][:, None, None]
        total[:, : self._carry.shape[1]] += self._carry
        last = j + 1 == len(self.columns.origins)
        own = self.columns.length if last else self.columns.origins[j + 1] - x
        # A copy, so that the whole window does not stay alive; the next row of windows begins without one.
        self._carry = total[:, :0].copy() if last else total[:, own:].copy()
        total = total[:, :own]

        kept = self._folder / f"{j}.npy"
        if i:
            above = np.load(kept, allow_pickle=False)
            total[: len(above)] += above
        if i + 1 < len(self.rows.origins):
            np.save(kept, total[self.rows.origins[i + 1] - y :], allow_pickle=False)
        (top, bottom), (left, right) = self.rows.own(i), self.columns.own(j)
        part = Window(top, left, max(0, bottom - top), max(0, right - left))
        return Finished(part, total[: part.height, : part.width])
