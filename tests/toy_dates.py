"""The toy data set with two dates, and a run that compares them."""

import dataclasses

import numpy as np
import toy

from sarjax.config import Inputs
from sarjax.options import Supervised
from sarjax.train import loop

SPEC = dataclasses.replace(toy.SPEC, dates=2)
COMPARED = Inputs(modalities=("sar",), normalisation="tile", date_difference=True)


def dataset(size: int = 32) -> toy.MemoryDataset:
    """Each tile's first date is another tile's: what differs is land and water as much as speckle."""
    now, before = toy.dataset(size), toy.dataset(size, seed=1)
    keys = [key for m in SPEC.modality_names for key in (m, f"{m}_valid")]
    tiles = {
        split: [
            a | {k: np.concatenate([b[k], a[k]]) for k in keys} for a, b in zip(rows, before.tiles[split], strict=True)
        ]
        for split, rows in now.tiles.items()
    }
    return dataclasses.replace(now, spec=SPEC, tiles=tiles, fingerprint="toy-dates")


def trained(folder, inputs=COMPARED, **experiment):
    """A run of two steps on it."""
    config = toy.config(Supervised(), inputs=inputs, steps=2, **experiment)
    loop.train(config, folder, dataset=dataset(), say=lambda line: None)
    return folder
