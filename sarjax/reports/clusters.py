"""The scene clusters that a run has found: how many tiles each holds, of which classes, and which are most like it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sarjax.errors import UserError
from sarjax.files import write_atomically
from sarjax.reports.drawing import display, figure, legend, paint, save
from sarjax.spec import IGNORE_LABEL, DatasetSpec


def summarise(
    shares: Float[np.ndarray, "n m"], classes: Int[np.ndarray, "n k"], spec: DatasetSpec, nearest: int
) -> list[dict[str, Any]]:
    """Per cluster, the largest first: `cluster` (its index), `tiles` that lie in it more than in any other, `share` of
    all tiles, `sureness` (their mean share in it), `classes` (share of its labelled pixels), and the positions of the
    `nearest` tiles, the surest first.

    shares: of each cluster in every tile. classes: labelled pixels per class of every tile.
    """
    home = shares.argmax(1)
    found = []
    for cluster in range(shares.shape[1]):
        members = np.flatnonzero(home == cluster)
        pixels = classes[members].sum(0)
        order = members[np.argsort(-shares[members, cluster], kind="stable")]
        found.append(
            {
                "cluster": cluster,
                "tiles": len(members),
                "share": len(members) / len(shares),
                "sureness": float(shares[members, cluster].mean()) if len(members) else None,
                "classes": {
                    name: float(n / pixels.sum()) if pixels.sum() else None
                    for name, n in zip(spec.class_names, pixels, strict=True)
                },
                "nearest": [int(i) for i in order[:nearest]],
            }
        )
    return sorted(found, key=lambda c: -c["tiles"])


def report_clusters(
    run: Path,
    *,
    split: str = "val",
    tiles: int = 6,
    checkpoint: str = "best",
    data_dir: str = "",
    say: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], tuple[Path, Path]]:
    """Writes RUN/reports/clusters-<split>.png and .json; returns `summarise` of them, and both paths.

    tiles: how many of the nearest ones are drawn. UserError for a run that clusters nothing, and for other data.
    """
    import jax

    from sarjax.config import Mesh
    from sarjax.reports.run import data_of, results_folder
    from sarjax.train.feed import device_batches
    from sarjax.train.mesh import make_mesh, replicated
    from sarjax.train.run import read_config, restore_run

    if tiles < 1:
        raise UserError(f"--tiles is {tiles}, but should be a whole number from 1.")
    dataset = data_of(run, read_config(run), split, data_dir)
    mesh = make_mesh(Mesh())
    restored = restore_run(run, mesh, checkpoint=checkpoint, say=say)
    method = restored.method
    if method.scenes is None:
        raise UserError(
            f"{run} finds no clusters of scenes (method {restored.config.experiment.method.NAME!r}); a run with a "
            "cluster objective would be accepted."
        )
    rows = dataset.split(split)
    scenes = jax.jit(method.scenes, out_shardings=replicated(mesh))
    shares, classes = [], []
    for batch in device_batches(rows, restored.config, mesh):
        kept = np.asarray(batch["row_valid"]) > 0
        shares.append(np.asarray(scenes(restored.params, restored.stats, batch))[kept])
        labels = np.asarray(batch["label"])[kept]
        classes += [np.bincount(x[x != IGNORE_LABEL], minlength=dataset.spec.num_classes) for x in labels]
    found = summarise(np.concatenate(shares), np.stack(classes), dataset.spec, tiles)
    for cluster in found:
        cluster["names"] = [rows.name(i) for i in cluster["nearest"]]

    folder = results_folder(run, "reports")
    png, path = (folder / f"clusters-{split}.{kind}" for kind in ("png", "json"))
    draw(png, found, rows, dataset.spec, tiles, f"{run}, {split}, {len(rows)} tiles, {restored.checkpoint}")
    content = {"run": str(run), "split": split, "checkpoint": restored.checkpoint, "tiles": len(rows)}
    write_atomically(path, json.dumps(content | {"clusters": found}, indent=1) + "\n")
    return found, (png, path)


def draw(path: Path, found: list[dict[str, Any]], rows: Any, spec: DatasetSpec, tiles: int, title: str) -> Path:
    """A sheet: a row per cluster with its size, its mix of classes, and its nearest tiles above their labels."""
    modality = spec.modalities[0]
    fig = figure(figsize=(3.2 + 1.3 * tiles, 2.7 * len(found) + 1.0))
    axes = fig.subplots(2 * len(found), tiles + 1, squeeze=False, gridspec_kw={"width_ratios": [2.2, *([1.0] * tiles)]})
    for ax in axes.ravel():
        ax.set_axis_off()
    for i, cluster in enumerate(found):
        grid = axes[2 * i : 2 * i + 2]
        grid[0][0].text(
            0, 0.5, f"cluster {cluster['cluster']}\n{cluster['tiles']} tiles ({cluster['share']:.1%})", va="center"
        )
        _mix(grid[1][0], cluster["classes"], spec)
        for column, position in enumerate(cluster["nearest"], 1):
            tile = rows[position]
            image = display(tile[modality.name][-1], tile[f"{modality.name}_valid"][-1], modality)
            grid[0][column].imshow(image, interpolation="nearest")
            grid[1][column].imshow(paint(tile["label"], spec), interpolation="nearest")
    fig.suptitle(title, fontsize=9)
    legend(fig, spec, ignored=True)
    return save(fig, path, dpi=100)


def _mix(ax: Any, shares: dict[str, float | None], spec: DatasetSpec) -> None:
    """One bar, cut by the classes' shares."""
    left = 0.0
    for share, colour in zip(shares.values(), spec.palette, strict=True):
        ax.barh(0, share or 0.0, left=left, color=[c / 255 for c in colour], ec="black", lw=0.3)
        left += share or 0.0
    ax.set_xlim(0, 1)
    ax.set_ylim(-1.5, 1.5)
