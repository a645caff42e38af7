"""`sarjax demo`: from nothing to a network that learnt from optical images and maps SAR alone, on synthetic scenes.

The setting is few labels, many pairs: one training tile of 32 is labelled, and each has an optical and a SAR image. The
student alone and the one that is taught see the same labels and take the same steps.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from sarjax import recipes
from sarjax.config import Config
from sarjax.machine import sharers
from sarjax.signals import Stopped

JOBS = ("teacher", "alone", "student")
TITLES = {
    "blind": "the most frequent class",
    "alone": "student alone: SAR, few labels",
    "student": "taught student: SAR, few labels",
    "teacher": "teacher: optical, few labels",
}


def majority(confusion: np.ndarray) -> np.ndarray:
    """The confusion matrix of always answering the class that is most frequent in the truth: the best blind guess."""
    answer = np.zeros_like(confusion)
    answer[:, int(np.argmax(confusion.sum(1)))] = confusion.sum(1)
    return answer


def run(
    out: Path,
    seed: int = 0,
    *,
    scenes: int = 12,
    size: tuple[int, int] = (1024, 1024),
    configs: Mapping[str, Config] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Everything goes to `out`; a second call goes on where the first one stopped.

    seed: of scenes and training. scenes, size: how many, of (width, height) pixels each. configs: of the jobs
    "teacher", "alone", "student" (None = recipes demo_*), a number of steps each; seed and data folder are set here.
    Raises Stopped where SIGTERM ended a training.
    """
    from sarjax.data.build import build, console_progress
    from sarjax.data.store import open_dataset
    from sarjax.data.synthesis import synthesize
    from sarjax.evaluate.metrics import metrics
    from sarjax.reports.maps import predict_run
    from sarjax.reports.run import draw_curves, draw_panels, evaluate_run
    from sarjax.reports.sheet import sheet
    from sarjax.train.loop import train

    began = time.monotonic()
    source, records = out / "scenes", out / "records"
    runs = {job: out / job for job in JOBS}

    say(f"1. {scenes} synthetic scenes of {size[0]}x{size[1]}: optical, SAR, labels")
    with console_progress("synthesize") as progress:
        synthesize(source, scenes, size, seed, progress=progress)

    say("2. records: tiles of 256x256, split by scene")
    with console_progress("build") as progress:
        build("whu_opt_sar", source, records, progress=progress, say=say)
    dataset = open_dataset("whu_opt_sar", data_dir=str(records))

    results = {}
    configs = configs or {job: recipes.find(f"demo_{job}") for job in JOBS}
    for number, job in enumerate(JOBS, 3):
        config = configs[job]
        share, tiles = config.experiment.data.labelled, len(dataset.split("train"))
        pairs = f", and {tiles} pairs of images" if job == "student" else ""
        say(f"{number}. {TITLES[job]}: {max(1, round(share * tiles))} labelled tiles of {tiles}{pairs}")
        mesh = dataclasses.replace(
            config.execution.mesh, data=sharers(config.experiment.batch_size, jax.device_count())
        )
        config = dataclasses.replace(
            config,
            experiment=dataclasses.replace(config.experiment, seed=seed),
            execution=dataclasses.replace(
                config.execution, mesh=mesh, data_dir=str(records), evaluate_every=60, checkpoint_every=60, log_every=20
            ),
        )
        state = train(config, runs[job], teacher=runs["teacher"] if job == "student" else None, say=say)
        if int(state.step) < config.experiment.steps:
            raise Stopped  # nobody should be compared with, or taught by, a network that is half trained
        results[job] = evaluate_run(runs[job], split="test", say=say).evaluation
        jax.clear_caches()  # a compiled step is of no use to the next job

    say("6. the three on the test scenes")
    found = {job: result.metrics(dataset.spec) for job, result in results.items()}
    found["blind"] = metrics(majority(results["alone"].confusion), dataset.spec.macro_classes)
    print(f"{'':<34}{'pixel accuracy':>15}{'mIoU':>8}{'kappa':>8}")
    for row, title in TITLES.items():
        print(f"{title:<34}{found[row].oa:>15.4f}{found[row].macro['iou']:>8.4f}{found[row].kappa:>8.4f}")

    say("7. a map of a scene that no network has seen, by the taught student from its SAR image alone")
    held_out = dataset.split("test").name(0).split("/")[0]
    with console_progress("predict") as progress:
        predict_run(
            runs["student"], [str(source / "sar" / f"{held_out}.tif")], out / "maps", say=say, progress=progress
        )

    say("8. pictures")
    sheet(dataset, "train", out / "tiles.png", 6)
    titles = {"alone": "student alone", "student": "taught student", "teacher": "teacher"}
    shown = {title: runs[job] for job, title in titles.items()}
    draw_panels(shown, out / "panels.png", split="test", tiles=5, data_dir=str(records))
    curves = draw_curves(runs["student"])
    pictures = [out / "panels.png", out / "maps" / f"{held_out}.png", out / "tiles.png", curves]
    say(f"done in {time.monotonic() - began:.0f} s; look at {', '.join(map(str, pictures))}")
