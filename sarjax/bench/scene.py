"""Maps of a whole scene, from TIFF to GeoTIFF, ours beside a PyTorch script: `sarjax bench scene`.

Every side is a process of its own, so that its peak of memory is its own, and all of them stay alive while they take
turns: one maps the scene while the others wait. All have the same weights and read the same file.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarjax import raster
from sarjax.bench import timing
from sarjax.bench.scene_sides import BANDS, MAP, SCENE, WEIGHTS, Task, save_weights
from sarjax.errors import UserError
from sarjax.machine import visible_cores
from sarjax.scenes.stages import STAGES
from sarjax.spec import IGNORE_LABEL

SIZES = ("3704x5556",)  # a scene of WHU-OPT-SAR
PEERS = ("torch", "torch.compile")
STRIPED = "striped"

Say = Callable[[str], None]


def bench_scene(
    sizes: Sequence[str] = SIZES,
    *,
    width: float = 1.0,
    classes: int = 8,
    window: int = 0,
    batch: int = 0,
    devices: int = 0,
    space: Sequence[int] = (),
    peers: Sequence[str] = PEERS,
    probabilities: bool = False,
    by_scene: bool = False,
    figures: bool = False,
    repetitions: int = timing.REPETITIONS,
    say: Say = print,
) -> dict[str, Any]:
    """Megapixels per second and memory of maps by LANet-R18, from two uint8 bands, and where their seconds go.

    Rows: a size and a side; "windows", "at once, N strip(s)", and the peers on the same windows as ours. "seconds" from
    the scene's file to the map's, without compilation; "peak_mb" resident in the process at most, "added_mb" of it more
    than before the first map (loaded, compiled, and called once with zeros). Seconds of each stage are medians; `busy`
    is the share of the whole for which the slowest stage was at work. "same" is the share of the pixels, no-data among
    them, in which the map is that of our windows.

    Args:
      sizes: HEIGHTxWIDTH in pixels, tiled and deflated, or HEIGHTxWIDTH:striped, in strips by LZW.
      width: of the network. classes: of the map.
      window: side of the windows; 0 = by the network. batch: windows per device at a time, of a peer in all; 0 = by
        their size.
      devices: host devices that windows are shared by; 0 = one per core.
      space: numbers of strips of a scene at once, each on a host device; () = without it.
      peers: of "torch" and "torch.compile"; where they cannot be measured their rows hold no figures.
      probabilities: also write those of all classes.
      by_scene: normalise by the scene's own statistics; no peer does.
      figures: compile and do not run; what the compiler says of scenes at once.
      repetitions: timed maps of each side.

    Raises:
      UserError: a size, a number of strips or a peer that cannot be, or a side that fails.
    """
    scenes = [parse_size(size) for size in sizes]
    _check(width, classes, devices, space, peers, repetitions)
    sides = [("windows", "windows", devices), *((f"at once, {n} strip{'s' * (n > 1)}", "whole", n) for n in space)]
    missing = peers if figures or _peers_are_missing(peers, by_scene, say) else ()
    sides += [(name, name, devices) for name in peers if name not in missing]
    rows: list[dict[str, Any]] = []
    for size, (height, across, striped) in zip(sizes, scenes, strict=True):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            if not figures:
                make_scene(Path(folder) / SCENE, height, across, striped)
            save_weights(Path(folder) / WEIGHTS, width, classes)
            workers: dict[str, _Worker] = {}
            for number, (name, side, count) in enumerate(sides):
                task = Task(
                    side, folder, f"{number}", height, across, width, classes, window, batch, count or visible_cores(),
                    probabilities, by_scene, figures,
                )  # fmt: skip
                workers[name] = stack.enter_context(_worker(task))
                say(f"{size}, {name}: ready")
            about = {"size": f"{height}x{across}", "layout": "striped, LZW" if striped else "tiled, deflate"}
            found = [about | {"side": name} | worker.facts for name, worker in workers.items()]
            if not figures:
                say(f"{size}: timing {repetitions} maps of each side, in turn")
                seconds = timing.in_turns({name: worker.map for name, worker in workers.items()}, repetitions)
                ours = Path(folder, "0", MAP)
                for row, worker in zip(found, workers.values(), strict=True):
                    spread = seconds[row["side"]]
                    row |= {"seconds": spread, "megapixels_per_second": height * across / 1e6 / spread["median"]}
                    row |= {"times_ours": spread["median"] / seconds["windows"]["median"]}
                    row |= worker.measured(repetitions) | {"same": same(ours, worker.folder / MAP)}
            rows += [*found, *(about | {"side": name, "seconds": None} for name in missing)]
    return {
        "benchmark": "scene",
        **timing.machine("rasterio", *(["torch"] if peers else [])),
        "network": f"lanet resnet18 x{width:g}",
        "classes": classes,
        "probabilities": probabilities,
        "by_scene": by_scene,
        "repetitions": 0 if figures else repetitions,
        "rows": rows,
    }


def parse_size(size: str) -> tuple[int, int, bool]:
    """(height, width, whether it is striped) of "HxW" or "HxW:striped"; UserError otherwise."""
    sides, colon, layout = size.partition(":")
    try:
        height, width = map(int, sides.lower().split("x"))
    except ValueError:
        height = width = 0
    if min(height, width) < 1 or (layout or colon) not in ("", STRIPED):
        raise UserError(f"size {size!r} is not understood: HEIGHTxWIDTH or HEIGHTxWIDTH:{STRIPED} is accepted.")
    return height, width, bool(layout)


def make_scene(path: Path, height: int, width: int, striped: bool = False) -> None:
    """Speckled shades in uint8, a tenth of its blocks without data; by block, or in strips, made in memory."""
    rng = np.random.default_rng(0)
    scene = np.empty((height, width, BANDS), np.uint8) if striped else None
    with contextlib.nullcontext() if striped else raster.create(path, height, width, BANDS, "uint8", no_data=0) as f:
        for y in range(0, height, raster.BLOCK):
            for x in range(0, width, raster.BLOCK):
                h, w = min(raster.BLOCK, height - y), min(raster.BLOCK, width - x)
                shade = 60 + 50 * np.sin(np.add.outer((y + np.arange(h)) / 57, (x + np.arange(w)) / 89))
                block = np.clip(shade[..., None] * rng.gamma(4, 0.25, (h, w, BANDS)), 1, 255).astype(np.uint8)
                block *= rng.random() > 0.1
                if scene is None:
                    f.write((y, x, h, w), block)
                else:
                    scene[y : y + h, x : x + w] = block
    if scene is not None:
        raster.write(path, scene, nodata=0)


def same(first: Path, second: Path) -> float:
    """The share of pixels in which two maps of one size are equal."""
    equal = total = 0
    with raster.open_raster(first) as a, raster.open_raster(second) as b:
        for top in range(0, a.info.height, raster.BLOCK):
            rows = top, 0, min(raster.BLOCK, a.info.height - top), a.info.width
            one, other = a.read(rows), b.read(rows)
            equal, total = equal + int((one == other).sum()), total + one.size
    return equal / total


def _check(
    width: float, classes: int, devices: int, space: Sequence[int], peers: Sequence[str], repetitions: int
) -> None:
    if not width > 0:
        raise UserError(f"width is {width}; a number above 0 is accepted.")
    if not 1 <= classes < IGNORE_LABEL:
        raise UserError(f"classes is {classes}; a number of classes from 1 to {IGNORE_LABEL - 1} is accepted.")
    if devices < 0:
        raise UserError(f"devices is {devices}; a number of devices from 1, or 0 for one per core, is accepted.")
    for n in space:
        if n < 1:
            raise UserError(f"space is {n}; a number of strips from 1 is accepted.")
    for name in peers:
        if name not in PEERS:
            raise UserError(f"peer {name!r} is not known; {' and '.join(PEERS)} are.")
    if repetitions < 1:
        raise UserError(f"repetitions is {repetitions}; a whole number from 1 is accepted.")


def _peers_are_missing(peers: Sequence[str], by_scene: bool, say: Say) -> bool:
    if peers and by_scene:
        say("PyTorch is left out: its script does not normalise by the scene")
        return True
    if peers and importlib.util.find_spec("torch") is None:
        say("PyTorch is left out: torch is not installed; pip install 'sarjax[bench]' would do")
        return True
    return False


# --- Processes


class _Worker:
    """A process that maps the scene when it is told to. facts: what it said when it was ready."""

    def __init__(self, task: Task, process: subprocess.Popen, errors: Any):
        self.folder, self._side, self._process, self._errors = Path(task.folder, task.out), task.side, process, errors
        self._maps: list[dict[str, Any]] = []
        self.facts = self._answer()

    def map(self) -> None:
        with contextlib.suppress(OSError):  # a process that is gone: its answer says why
            self._process.stdin.write("map\n")
            self._process.stdin.flush()
        self._maps.append(self._answer())

    def measured(self, repetitions: int) -> dict[str, Any]:
        """Of the last maps: memory, seconds of each stage, and how busy the slowest was."""
        maps = self._maps[-repetitions:]
        stages = {name: float(np.median([m["stages"][name] for m in maps])) for name in STAGES}
        slowest = max(stages, key=stages.__getitem__)
        busy = float(np.median([m["stages"][slowest] / m["seconds"] for m in maps]))
        memory = {key: maps[-1][key] for key in ("peak_mb", "added_mb")}
        return memory | {f"{name}_s": seconds for name, seconds in stages.items()} | {"slowest": slowest, "busy": busy}

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line.startswith("{"):
            code = self._process.wait()
            self._errors.seek(0)
            last = ([text for text in self._errors.read().splitlines() if text.strip()] or ["it said nothing"])[-1]
            said = last if code == 2 else f"the process that measures {self._side} ended with code {code}: {last}"
            raise UserError(said)
        return json.loads(line)


@contextlib.contextmanager
def _worker(task: Task) -> Iterator[_Worker]:
    """A side's process, ready; it ends with the block."""
    Path(task.folder, task.out).mkdir()
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "sarjax.bench.scene_sides", json.dumps(task._asdict())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield _Worker(task, process, errors)
        finally:
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()
