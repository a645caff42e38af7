"""The script that a good user of PyTorch would write to map a scene: overlapping windows, read and written by rasterio.

A thread reads ahead, batches of windows go through the network in channels_last under inference_mode, and another
thread writes each window's middle as soon as it is there. Windows and overlap are ours.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
from rasterio.windows import Window

from sarjax.bench.worker import most_resident
from sarjax.machine import visible_cores
from sarjax.scenes.stages import Stages

AHEAD = 2  # batches that are read before they are needed
NO_DATA = 255


class Tile(NamedTuple):
    """Where a window begins, and which part of it is kept: its middle, up to the scene's border where it lies there."""

    y: int
    x: int
    keep: tuple[slice, slice]


def sliding_windows(task: Any) -> tuple[dict[str, Any], Callable[[Stages], None]]:
    """(what there is to say, what maps the scene); see `sarjax.bench.scene_sides`."""
    torch.set_num_threads(visible_cores())
    torch.set_float32_matmul_precision("highest")
    before = most_resident() or 0
    from sarjax.bench.peers import load, peer
    from sarjax.bench.scene_sides import BANDS, TILE, WEIGHTS, facts_of, load_weights, options_of
    from sarjax.models import build_network
    from sarjax.reports.makers import PIXELS
    from sarjax.scenes.windows import choose, grid

    options = options_of(task.network_width)
    context = build_network(options, task.classes).context
    # jax comes with what the network is described by, and no user of PyTorch would have it.
    foreign = (most_resident() or 0) - before
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = peer(options, BANDS, task.classes)
    load(network, *load_weights(task.path(WEIGHTS)))
    network = network.to(device, memory_format=torch.channels_last).eval()
    if task.side == "torch.compile":
        network = torch.compile(network)

    chosen = choose(context, TILE, task.window)
    batch = task.batch or max(1, PIXELS // chosen.side**2)
    rows, columns = grid(task.height, task.width, chosen, context, batch)
    tiles = [
        Tile(y, x, (_kept(y, rows, chosen.overlap), _kept(x, columns, chosen.overlap)))
        for y in rows.origins
        for x in columns.origins
    ]
    batches = [tiles[i : i + batch] for i in range(0, len(tiles), batch)]
    script = Script(task, network, device, (rows.length, columns.length))
    for count in {len(group) for group in batches}:
        script.answer(torch.zeros(count, BANDS, rows.length, columns.length))
    facts = facts_of(rows, columns, chosen.overlap) | {"batch": batch, "foreign_bytes": foreign}
    return facts, lambda stages: script.map(batches, stages)


def _kept(origin: int, axis: Any, overlap: int) -> slice:
    start = overlap if origin else 0
    end = axis.length - (overlap if origin + axis.length < axis.padded else 0)
    return slice(start, min(end, axis.size - origin))


class Script:
    """The script of one scene. shape: (height, width) of its windows."""

    def __init__(self, task: Any, network: torch.nn.Module, device: str, shape: tuple[int, int]):
        from sarjax.bench.scene_sides import MEAN, SCENE, STD

        self.task, self.network, self.device, self.shape = task, network, device, shape
        self.scene, self.mean, self.std = task.path(SCENE), MEAN, STD

    def map(self, batches: list[list[Tile]], stages: Stages) -> None:
        labels, probabilities = self.task.maps
        with (
            rasterio.open(self.scene) as source,
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as writer,
        ):
            profile = {
                "driver": "GTiff", "height": source.height, "width": source.width, "tiled": True, "blockxsize": 256,
                "blockysize": 256, "interleave": "pixel", "compress": "deflate", "crs": source.crs,
                "transform": source.transform, "num_threads": "all_cpus",
            }  # fmt: skip
            files = [rasterio.open(labels, "w", **profile, count=1, dtype="uint8", nodata=NO_DATA, predictor=2)]
            if probabilities:
                more = {"count": self.task.classes, "dtype": "float32", "nodata": np.nan, "predictor": 3}
                files.append(rasterio.open(probabilities, "w", **profile, **more))

            def read(group: list[Tile]) -> tuple[torch.Tensor, list[np.ndarray]]:
                with stages("read"):
                    found = [self.read(source, tile) for tile in group]
                with stages("prepare"):
                    x = torch.from_numpy(np.stack([image for image, _ in found])).float()
                    valid = torch.from_numpy(np.stack([valid for _, valid in found]))[:, None]
                    return torch.where(valid, (x - self.mean) / self.std, 0.0), [valid for _, valid in found]

            def write(tile: Tile, valid: np.ndarray, *values: np.ndarray) -> None:
                with stages("blend"):
                    seen = valid[tile.keep]
                    parts = [np.where(seen, values[0][tile.keep], NO_DATA).astype(np.uint8)[None]]
                    parts += [np.where(seen, v[:, *tile.keep], np.float32(np.nan)) for v in values[1:]]
                with stages("write"):
                    part = Window(tile.x + tile.keep[1].start, tile.y + tile.keep[0].start, *seen.shape[::-1])
                    for file, values in zip(files, parts, strict=True):
                        file.write(values, window=part)

            ahead = deque[Future](reader.submit(read, group) for group in batches[:AHEAD])
            writing = deque[Future]()
            for i, group in enumerate(batches):
                x, valid = ahead.popleft().result()
                if i + AHEAD < len(batches):
                    ahead.append(reader.submit(read, batches[i + AHEAD]))
                with stages("compute"):
                    answers = self.answer(x)
                for k, tile in enumerate(group):
                    writing.append(writer.submit(write, tile, valid[k], *(a[k] for a in answers)))
                while len(writing) > 2 * len(group):
                    writing.popleft().result()
            for future in writing:
                future.result()
            with stages("write"):
                for file in files:
                    file.close()

    def read(self, source: Any, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """(pixels (c, h, w), whether there are data (h, w)); zeros beyond the scene."""
        h, w = min(self.shape[0], source.height - tile.y), min(self.shape[1], source.width - tile.x)
        part = Window(tile.x, tile.y, w, h)
        image = np.zeros((source.count, *self.shape), np.uint8)
        valid = np.zeros(self.shape, bool)
        image[:, :h, :w] = source.read(window=part)
        valid[:h, :w] = source.read_masks(window=part).any(0)
        return image, valid

    @torch.inference_mode()
    def answer(self, x: torch.Tensor) -> list[np.ndarray]:
        """Classes (b, h, w) and, where asked for, probabilities (b, k, h, w) of normalised images (b, c, h, w)."""
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        scores = self.network(x)
        found = [scores.argmax(1).to(torch.uint8)]
        if self.task.probabilities:
            found.append(scores.softmax(1))
        return [value.cpu().numpy() for value in found]
