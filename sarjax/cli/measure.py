"""`sarjax bench input`, `build` and `start`: how fast data get in, and a run under way."""

from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli.common import note, size_of, stoppable

LEFT = "what was made is left in --folder, or gone with its own"


def input_(
    scenes: int = 2,
    size: str = "5556x3704",
    batch: int = 8,
    sensors: tuple[Literal["sar", "optical"], ...] = ("sar", "optical"),
    threads: int = 2,
    torch: FlagCreatePairsOff[bool] = True,
    repetitions: int = 5,
    folder: Path | None = None,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure the input: tiles per second and core from records to devices, beside a PyTorch DataLoader's from TIFF

    Args:
        scenes: how many are made up; three fifths of their tiles are read.
        size: WxH in pixels.
        batch: tiles in a batch.
        sensors: whose images are read, beside labels.
        threads: that read ahead, as --prefetch of a run.
        torch: also what PyTorch and rasterio take, where torch is installed.
        repetitions: passes over all tiles of each side, in turn, after one that does not count.
        folder: where scenes and records are made and stay for the next time (default: one that goes at the end).
        json: print one line of JSON instead of a table.
    """
    from sarjax.bench.input import PEERS, bench_input
    from sarjax.cli.bench import show

    with stoppable(LEFT):
        found = bench_input(
            scenes=scenes,
            size=size_of(size),
            batch=batch,
            sensors=sensors,
            threads=threads,
            repetitions=repetitions,
            peers=tuple(PEERS) if torch else (),
            folder=folder,
            say=note,
        )
    show(found, json)


def build(
    scenes: tuple[int, ...] = (3,),
    size: str = "5556x3704",
    jobs: tuple[int, ...] = (1, 2),
    compression: Literal["zstd", "zlib", "none"] = "zstd",
    repetitions: int = 5,
    folder: Path | None = None,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure building WHU-OPT-SAR's records: seconds per scene and memory, by number of scenes and of processes

    Args:
        scenes: how many are made up; each number is built.
        size: WxH in pixels.
        jobs: numbers of processes that read and compress.
        compression: of the records.
        repetitions: builds of each, in turn, after one that does not count.
        folder: where scenes are made and stay for the next time (default: one that goes at the end).
        json: print one line of JSON instead of a table.
    """
    from sarjax.bench.build import bench_build
    from sarjax.cli.bench import show

    with stoppable(LEFT):
        found = bench_build(
            scenes=scenes,
            size=size_of(size),
            jobs=jobs,
            compression=compression,
            repetitions=repetitions,
            folder=folder,
            say=note,
        )
    show(found, json)


def start(
    recipe: Positional[str] = "synthetic_sar",
    preset: str = "",
    batch: int = 8,
    torch: FlagCreatePairsOff[bool] = True,
    repetitions: int = 5,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure start-up: seconds to help, and to a recipe's first step with a cold and with a warm compilation cache

    Args:
        recipe: what is trained on made-up scenes; one of whu_opt_sar that learns without a teacher.
        preset: a preset of the recipe, such as cpu.
        batch: tiles of a step.
        torch: also PyTorch's import and first step, where torch is installed.
        repetitions: starts of each, in turn, after one that does not count.
        json: print one line of JSON instead of a table.
    """
    from sarjax.bench.start import bench_start
    from sarjax.cli.bench import show

    with stoppable("nothing was kept"):
        found = bench_start(recipe, preset=preset, batch=batch, repetitions=repetitions, torch=torch, say=note)
    show(found, json)
