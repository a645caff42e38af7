"""Verbs that put a trained run to use: predict, export."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli import common
from sarjax.cli.common import note, print_json
from sarjax.errors import UserError
from sarjax.machine import visible_cores


def predict(
    run: Positional[Path],
    scenes: Positional[tuple[str, ...]],
    out: Path,
    t1: str = "",
    t2: str = "",
    checkpoint: Literal["best", "last"] = "best",
    ema: FlagCreatePairsOff[bool] = False,
    head: str = "",
    window: int = 0,
    overlap: int | None = None,
    batch: int = 0,
    space: Annotated[int, tyro.conf.arg(name="mesh.space")] = 0,
    allow_global: FlagCreatePairsOff[bool] = False,
    tta: FlagCreatePairsOff[bool] = False,
    probabilities: FlagCreatePairsOff[bool] = False,
    overwrite: FlagCreatePairsOff[bool] = False,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Make maps of whole scenes: GeoTIFF, quick-look and areas of each; the same command goes on where it stopped

    Args:
        run: the run's directory.
        scenes: raster files; `sar=A.tif,optical=B.tif` for a run that reads both, `sar=BEFORE.tif+AFTER.tif` for two
            dates; or folders of such files (with a subfolder per sensor where a run reads several).
        out: the folder for the maps.
        t1: instead of scenes, for a run that reads two dates: the first date's raster (`sar=A.tif,optical=B.tif` for
            several sensors), or a folder of them.
        t2: the second date's, on the same grid; in a folder, of the same names.
        checkpoint: the best on val (the last where none was kept), or the last.
        ema: use the running mean of the parameters.
        head: which of the method's heads ("" = its default).
        window: side of the windows in pixels (0 = by the network).
        overlap: pixels by which a window reaches beyond its part, on each side (None = by the network: far enough
            that windows give what the whole image would, where that is possible).
        batch: windows per device at a time (0 = by the size of the window).
        space: instead of windows, each scene as one image in strips over so many devices (-1 = all); memory per
            device falls with their number.
        allow_global: with --mesh.space, also for networks that take means of the whole image.
        tta: mean over the eight symmetries of the square; takes eight times as long.
        probabilities: also write the probability of every class.
        overwrite: make maps again, also those made with other settings or from other files, and replace files that are
            no maps.
        json: print JSON instead of lines.
    """
    from sarjax.train.run import read_manifest

    if bool(t1) != bool(t2):
        given, other = ("--t1", "--t2") if t1 else ("--t2", "--t1")
        raise UserError(f"{given} is given without {other}; both dates, or neither, are accepted.")
    if t1 and scenes:
        raise UserError(f"{scenes[0]} is given beside --t1 and --t2; scenes, or the two dates of them, are accepted.")
    if not (t1 or scenes):
        raise UserError(
            "sarjax predict needs a scene after the run: a raster file, a folder of them, or --t1 and --t2 for two "
            "dates."
        )
    host_devices = read_manifest(run).get("host_devices", 0)
    common.devices(max(space, host_devices or visible_cores()) if space > 0 else host_devices)
    from sarjax.data.build import console_progress
    from sarjax.reports.maps import predict_run

    with common.stoppable(), console_progress("predict") as progress:
        maps = predict_run(
            run,
            scenes,
            out,
            dates=(t1, t2) if t1 else None,
            head=head,
            checkpoint=checkpoint,
            ema=ema,
            window=window,
            overlap=overlap,
            tta=tta,
            probabilities=probabilities,
            batch=batch,
            space=space,
            allow_global=allow_global,
            overwrite=overwrite,
            say=note,
            progress=progress,
        )
    if json:
        print_json(maps)


def export(
    run: Positional[Path],
    file: Positional[Path],
    checkpoint: Literal["best", "last"] = "best",
    ema: FlagCreatePairsOff[bool] = False,
    head: str = "",
    size: str = "",
    batch: int = 0,
    precision: Literal["", "float32", "bfloat16"] = "",
    logits: FlagCreatePairsOff[bool] = True,
    overwrite: FlagCreatePairsOff[bool] = False,
) -> None:
    """Export a run as one file that jax runs without sarjax, on cpu, cuda and tpu

    Args:
        run: the run's directory.
        file: the artifact to write; FILE.json beside it says what goes in and out, and how to call it.
        checkpoint: the best on val, or the last.
        ema: use the running mean of the parameters.
        head: which of the method's heads ("" = its default).
        size: HxW in pixels; "" = any multiple of the network's alignment.
        batch: images per call (0 = any number).
        precision: that the network computes in ("" = as it was trained).
        logits: the scores of the classes come out beside the labels.
        overwrite: replace files of that name that are no export; the run's own never are.
    """
    fixed = None
    if size:
        try:
            height, width = (int(n) for n in size.lower().split("x"))
        except ValueError as e:
            raise UserError(f"--size is {size!r}; HxW in pixels, such as 512x512, is accepted.") from e
        fixed = height, width
    common.devices(1)
    from sarjax.export import export_run

    path = export_run(
        run,
        file,
        head=head,
        checkpoint=checkpoint,
        ema=ema,
        size=fixed,
        batch=batch or None,
        precision=precision,
        logits=logits,
        overwrite=overwrite,
        say=note,
    )
    print(path)
