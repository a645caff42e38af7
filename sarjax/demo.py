"""`sarjax demo`: from nothing to a map of synthetic scenes: synthesize, build, train on SAR, evaluate, map."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sarjax import recipes
from sarjax.config import Config


def majority(confusion: np.ndarray) -> np.ndarray:
    """The confusion matrix of always answering the class that is most frequent in the truth: the best blind guess."""
    answer = np.zeros_like(confusion)
    answer[:, int(np.argmax(confusion.sum(1)))] = confusion.sum(1)
    return answer


def run(
    out: Path,
    seed: int = 0,
    *,
    scenes: int = 5,
    size: tuple[int, int] = (1024, 1024),
    config: Config | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Everything goes to `out`; a second call goes on where the first one stopped.

    seed: of scenes and training. scenes, size: how many, of (width, height) pixels each. config: of the training
    (None = recipe synthetic_sar); its seed and its data folder are set here.
    """
    from rich.console import Console

    from sarjax.data.build import build, console_progress
    from sarjax.data.store import open_dataset
    from sarjax.data.synthesis import synthesize
    from sarjax.evaluate.metrics import metrics
    from sarjax.reports.evaluation import table
    from sarjax.reports.maps import predict_run
    from sarjax.reports.run import draw_curves, draw_panels, evaluate_run
    from sarjax.reports.sheet import sheet
    from sarjax.train.loop import train

    began = time.monotonic()
    source, records, workdir = out / "scenes", out / "records", out / "run"

    say(f"1. {scenes} synthetic scenes of {size[0]}x{size[1]}: optical, SAR, labels")
    with console_progress("synthesize") as progress:
        synthesize(source, scenes, size, seed, progress=progress)

    say("2. records: tiles of 256x256, split by scene")
    with console_progress("build") as progress:
        build("whu_opt_sar", source, records, progress=progress, say=say)

    say("3. LANet on SAR alone")
    config = config or recipes.find("synthetic_sar")
    config = dataclasses.replace(
        config,
        experiment=dataclasses.replace(config.experiment, seed=seed),
        execution=dataclasses.replace(config.execution, data_dir=str(records), evaluate_every=60, log_every=20),
    )
    train(config, workdir, say=say)

    say("4. evaluation on the test scenes")
    result = evaluate_run(workdir, split="test", say=say)
    dataset = open_dataset("whu_opt_sar", data_dir=str(records))
    Console().print(table(result.evaluation, dataset.spec, "synthetic scenes, test, SAR only"))
    ours = result.evaluation.metrics(dataset.spec)
    floor = metrics(majority(result.evaluation.confusion), dataset.spec.macro_classes)
    print(f"{'':<24}{'pixel accuracy':>16}{'mIoU':>8}{'kappa':>8}")
    for name, m in (("the most frequent class", floor), ("LANet on SAR", ours)):
        print(f"{name:<24}{m.oa:>16.4f}{m.macro['iou']:>8.4f}{m.kappa:>8.4f}")

    say("5. a map of a scene that the network has never seen, from its SAR image alone")
    held_out = dataset.split("test").name(0).split("/")[0]
    with console_progress("predict") as progress:
        predict_run(workdir, [str(source / "sar" / f"{held_out}.tif")], out / "maps", say=say, progress=progress)

    say("6. pictures")
    sheet(dataset, "train", out / "tiles.png", 6)
    draw_panels(workdir, out / "panels.png", split="test", tiles=5, data_dir=str(records))
    curves = draw_curves(workdir)
    pictures = [out / "panels.png", out / "maps" / f"{held_out}.png", out / "tiles.png", curves]
    say(f"done in {time.monotonic() - began:.0f} s; look at {', '.join(map(str, pictures))}")
