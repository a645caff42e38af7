"""Tables and pictures of a run, made from the run's own files."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarjax.config import Config
from sarjax.data.store import Dataset, open_dataset
from sarjax.errors import UserError, unknown
from sarjax.evaluate.evaluator import Evaluation
from sarjax.spec import DatasetSpec


class EvaluatedRun(NamedTuple):
    """What `sarjax eval` found, at which step, and the files it wrote."""

    evaluation: Evaluation
    spec: DatasetSpec
    step: int
    files: tuple[Path, ...]


def evaluate_run(
    run: Path,
    *,
    split: str = "val",
    checkpoint: str = "best",
    ema: bool = False,
    head: str = "",
    data_dir: str = "",
    say: Callable[[str], None] = print,
) -> EvaluatedRun:
    """Evaluates a run on `split` and writes RUN/eval/<split>-<checkpoint>.{json,csv,png}.

    A look at the test split is written to the manifest before it happens. UserError for data other than the run's own,
    and for a RUN/eval that cannot be written to.
    """
    import jax

    from sarjax.config import Mesh
    from sarjax.evaluate.evaluator import make_count_step
    from sarjax.reports.evaluation import confusion_png, write_csv, write_json
    from sarjax.train.feed import run_evaluation
    from sarjax.train.mesh import make_mesh, replicated
    from sarjax.train.run import read_config, read_manifest, restore_run, write_manifest

    mesh = make_mesh(Mesh())
    dataset = data_of(run, read_config(run), split, data_dir)
    folder = results_folder(run)
    restored = restore_run(run, mesh, checkpoint=checkpoint, ema=ema, say=say)
    name, chosen = restored.head(head)
    if split == "test":
        manifest = read_manifest(run)
        look = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "checkpoint": restored.checkpoint,
            "ema": ema,
            "head": name,
        }
        manifest.setdefault("test_looks", []).append(look)
        write_manifest(run, manifest)
        say(f"look {len(manifest['test_looks'])} of this run at the test split, noted in its manifest")
    count = jax.jit(make_count_step(chosen.predict, dataset.spec.num_classes), out_shardings=replicated(mesh))
    evaluation = run_evaluation(count, chosen, restored.params, restored.stats, dataset, split, restored.config, mesh)

    stem = "-".join([split, checkpoint, *(["ema"] if ema else []), *([head] if head else [])])
    files = tuple(folder / f"{stem}.{kind}" for kind in ("json", "csv", "png"))
    write_json(files[0], evaluation, dataset.spec)
    write_csv(files[1], evaluation, dataset.spec)
    confusion_png(files[2], evaluation.confusion, dataset.spec.class_names)
    return EvaluatedRun(evaluation, dataset.spec, restored.step, files)


def data_of(run: Path, config: Config, split: str, data_dir: str) -> Dataset:
    """The data set that `run` was trained on; UserError for another, or without `split`."""
    data = config.experiment.data
    dataset = open_dataset(data.name, data.config, data_dir or config.execution.data_dir)
    if split not in dataset.splits:
        raise unknown(f"split of {dataset.spec.name}", split, dataset.splits)
    if dataset.fingerprint != data.fingerprint:
        raise UserError(
            f"{dataset.directory} is not what {run} was trained on (fingerprint {dataset.fingerprint}, not "
            f"{data.fingerprint}); the records of that build would be accepted (--data-dir)."
        )
    return dataset


def results_folder(run: Path, name: str = "eval") -> Path:
    """RUN/`name`, made where it is not there; UserError where nothing can be written to it."""
    folder = run / name
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; a writable folder is needed.") from e
    return folder


def describe(run: Path) -> dict[str, Any]:
    """What a run is and how far it came, from its config, manifest and metrics."""
    from sarjax.train.loggers import read_metrics
    from sarjax.train.run import read_config, read_manifest

    config, manifest = read_config(run), read_manifest(run)
    e = config.experiment
    rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    trained = [row for row in rows if "loss" in row]
    validated = [row for row in rows if row.get("val/miou") is not None]
    facts: dict[str, Any] = {
        "run": str(run),
        "recipe": config.recipe,
        "data": f"{e.data.name} ({e.data.fingerprint})",
        "inputs": " + ".join(e.inputs.modalities),
        "network": e.network.NAME,
        "method": e.method.NAME,
        "seed": e.seed,
        "batch": e.batch_size,
    }
    starts = manifest.get("starts", [])
    if starts:
        first = starts[0]
        facts["started"] = f"{first['time']} on {first['devices']} x {first['device']} (jax {first['versions']['jax']})"
        facts["starts"] = len(starts)
    if trained:
        last = trained[-1]
        facts |= {"step": last["step"], "loss": last["loss"], "skipped steps": int(last["skipped"] or 0)}
    if validated:
        best = max(validated, key=lambda row: row["val/miou"])
        facts |= {
            "val mIoU": validated[-1]["val/miou"],
            "best val mIoU": f"{best['val/miou']:.4f} at step {best['step']}",
        }
    facts["looks at test"] = len(manifest.get("test_looks", []))
    return facts


def draw_curves(run: Path) -> Path | None:
    """RUN/curves.png from metrics.jsonl; None where nothing is written yet."""
    from sarjax.reports.evaluation import curves
    from sarjax.train.loggers import read_metrics

    path = run / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        return None
    curves(run / "curves.png", rows, title=str(run.name))
    return run / "curves.png"


def draw_panels(runs: Mapping[str, Path], out: Path, *, split: str = "val", tiles: int = 4, data_dir: str = "") -> Path:
    """A PNG of `tiles` evenly spaced tiles of `split`: each sensor, truth, and what every run predicts.

    runs: by the title of their column; of the same data. UserError for other data.
    """
    import jax
    import numpy as np

    from sarjax.config import Mesh
    from sarjax.data.pipeline import evaluation_batches
    from sarjax.reports.evaluation import panels
    from sarjax.train.mesh import make_mesh, put_batch, replicated, row_shards
    from sarjax.train.run import restore_run

    mesh = make_mesh(Mesh())
    predictions: dict[str, list[Any]] = {}
    for title, run in runs.items():
        restored = restore_run(run, mesh)
        dataset = data_of(run, restored.config, split, data_dir)
        rows = dataset.split(split)
        chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(tiles, len(rows))).round()]
        _, head = restored.head()
        predict = jax.jit(
            lambda p, s, b, head=head: jax.numpy.argmax(head.predict(p, s, b), -1).astype("uint8"),
            out_shardings=replicated(mesh),
        )
        found: list[Any] = []
        for batch in evaluation_batches(chosen, row_shards(mesh)):
            found.extend(np.asarray(predict(restored.params, restored.stats, put_batch(mesh, batch))))
        predictions[title] = found[: len(chosen)]
    panels(out, chosen, predictions, dataset.spec)
    return out
