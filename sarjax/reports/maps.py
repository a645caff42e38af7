"""Maps of whole scenes from a trained run: `sarjax predict`.

OUT/ <scene>.tif  <scene>_probabilities.tif  <scene>.png (a look at it)  <scene>.json (what it was made from; last)
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sarjax import __version__, raster
from sarjax import config as configs
from sarjax.config import Inputs
from sarjax.errors import UserError, unknown
from sarjax.files import write_atomically
from sarjax.scenes.inputs import Reads, Scene, open_scene, parse_scenes
from sarjax.scenes.predict import Engine, Mapped, Progress, map_scene
from sarjax.scenes.windows import Windows, choose, cut
from sarjax.spec import IGNORE_LABEL, DatasetSpec

if TYPE_CHECKING:
    import jax

    from sarjax.methods.record import Head
    from sarjax.train.run import Restored

MADE_BY = "sarjax predict"
TAG = "SARJAX_MAP"  # in the rasters, so that an interrupted call knows them again
PIXELS = 2**20  # per device and batch by default: one large window, or several small ones
TILE = 256  # side of the tiles of runs that did not note it


class Outputs(NamedTuple):
    """The files of one scene's map."""

    labels: Path
    probabilities: Path
    look: Path
    record: Path


def predict_run(
    run: Path,
    scenes: Sequence[str],
    out: Path,
    *,
    head: str = "",
    checkpoint: str = "best",
    ema: bool = False,
    window: int = 0,
    overlap: int | None = None,
    tta: bool = False,
    probabilities: bool = False,
    batch: int = 0,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Makes a map of each of `scenes` in the folder `out`, over all visible devices.

    All scenes are checked before the first map is made. A scene whose map was made from the same files by the same
    checkpoint in the same way is left alone; any other is made again.

    Args:
      run: the run's directory.
      scenes: as `sarjax.scenes.inputs.parse_scenes` reads them.
      out: made where it is not there.
      head: of the method; "" = its first. checkpoint, ema: see `restore_run`.
      window, overlap: in pixels; 0 and None = by the network, see `sarjax.scenes.windows.choose`.
      tta: the mean over the eight symmetries of the square.
      probabilities: also write the probability of each class.
      batch: windows per device at a time; 0 = by the window's size.
      overwrite: makes every map again, and replaces files in `out` that are no maps of ours. Never an input.
      progress: called as (stage, done, total).

    Returns:
      What each <scene>.json holds, in the order of the scenes.

    Raises:
      UserError: a scene that does not fit the run, files that are in the way, a folder that cannot be written to.
    """
    from sarjax.config import Mesh
    from sarjax.train.mesh import make_mesh, row_shards
    from sarjax.train.run import restore_run

    run, mesh = Path(run), make_mesh(Mesh())
    restored = restore_run(run, mesh, checkpoint=checkpoint, ema=ema, say=say)
    heads = restored.method.heads
    name = head or next(iter(heads))
    if name not in heads:
        raise unknown(f"head of {run}", name, heads)
    engine = _engine(restored, name, mesh, choose_windows(run, restored, name, window, overlap, say), batch, tta)
    settings = _settings(run, restored, name, engine.windows, ema, tta)
    records = []
    for scene, size, files in _tasks(scenes, engine.reads, Path(out), overwrite):
        about = settings | {"inputs": _inputs(scene)}
        done = None if overwrite else _finished(files, about, probabilities)
        if done:
            say(f"{files.labels} is there already, made from the same files in the same way")
        else:
            rows = _rows(engine, size, row_shards(mesh))
            done = _make(engine._replace(rows=rows), scene, size, files, about, probabilities, say, progress)
        records.append(done)
    return records


def choose_windows(
    run: Path, restored: "Restored", head: str, side: int, overlap: int | None, say: Callable[[str], None]
) -> Windows:
    """The windows that were asked for, else those that fit the head and the tiles that the run was trained on."""
    from sarjax.train.run import read_manifest

    context = restored.method.heads[head].context
    trained = restored.config.experiment.augment.crop or min(read_manifest(run).get("tile") or [TILE])
    windows = choose(context, trained, side, overlap)
    if context.radius is not None and windows.overlap < context.radius:
        say(
            f"an overlap of {windows.overlap} is less than the {context.radius} that this network looks: seams may show"
        )
    return windows


def _engine(
    restored: "Restored", name: str, mesh: "jax.sharding.Mesh", windows: Windows, batch: int, tta: bool
) -> Engine:
    """What makes the maps; its `rows` are those of one device."""
    if batch < 0:
        raise UserError(f"--batch is {batch}, but should be a whole number from 1, or 0 to leave it open.")
    head, inputs = restored.method.heads[name], restored.config.experiment.inputs
    return Engine(
        _on_devices(head, restored, mesh, tta),
        reads_of(name, head, inputs, restored.spec),
        head.context,
        windows,
        batch or max(1, PIXELS // windows.side**2),
        inputs.normalisation == "tile",
    )


def _settings(run: Path, restored: "Restored", name: str, windows: Windows, ema: bool, tta: bool) -> dict[str, Any]:
    """What a map depends on besides its input files."""
    experiment = configs.to_json(restored.config.experiment)
    return {
        "run": str(run.resolve()),
        "experiment": hashlib.sha256(experiment.encode()).hexdigest()[:16],
        "checkpoint": restored.checkpoint,
        "step": restored.step,
        "ema": ema,
        "head": name,
        "window": windows.side,
        "overlap": windows.overlap,
        "tta": tta,
    }


def reads_of(name: str, head: "Head", inputs: Inputs, spec: DatasetSpec) -> Reads:
    """What head `name` reads of scenes: sensors by its `requires`, dates by the run's inputs; UserError for more."""
    modalities = tuple(m for m in spec.modality_names if m in head.requires)
    odd = sorted(set(head.requires) - {key for m in modalities for key in (m, f"{m}_valid")})
    if odd or not modalities:
        raise UserError(f"head {name!r} reads {', '.join(odd) or 'no image'}, which no scene has; another would do.")
    dates = range(spec.dates) if inputs.dates == "all" else sorted(set(inputs.dates))
    return Reads(spec, modalities, tuple(dates))


def _on_devices(head: "Head", restored: "Restored", mesh: "jax.sharding.Mesh", tta: bool) -> Callable[..., Any]:
    """(batch of numpy arrays) -> probabilities, rows over the mesh; compiled once for each shape."""
    import jax
    import jax.numpy as jnp

    from sarjax.scenes.symmetry import over_symmetries
    from sarjax.train.mesh import batch_sharding, put_batch

    def probabilities(params: Any, stats: Any, batch: Any) -> Any:
        def once(rows: Any) -> Any:
            return jax.nn.softmax(head.predict(params, stats, rows).astype(jnp.float32), -1)

        return (over_symmetries(once) if tta else once)(batch)

    step = jax.jit(probabilities, out_shardings=batch_sharding(mesh, 1))
    return lambda batch: step(restored.params, restored.stats, put_batch(mesh, batch))


def _tasks(
    scenes: Sequence[str], reads: Reads, out: Path, overwrite: bool
) -> list[tuple[Scene, tuple[int, int], Outputs]]:
    """Each scene with its size and its files, after all of them were looked at."""
    parsed = parse_scenes(scenes, reads)
    sizes = [_size(scene, reads) for scene in parsed]
    outputs = [_outputs(out, scene.name) for scene in parsed]
    _check_outputs(parsed, outputs, out, overwrite)
    return list(zip(parsed, sizes, outputs, strict=True))


def _size(scene: Scene, reads: Reads) -> tuple[int, int]:
    with open_scene(scene, reads) as source:
        return source.height, source.width


def _rows(engine: Engine, size: tuple[int, int], shards: int) -> int:
    """Windows in a batch: as many as asked for on every device, but not more than the scene has."""
    count = 1
    for n in size:
        count *= len(cut(n, engine.windows, engine.context.alignment).origins)
    return shards * min(engine.rows, -(-count // shards))


def _make(
    engine: Engine,
    scene: Scene,
    size: tuple[int, int],
    files: Outputs,
    about: dict[str, Any],
    probabilities: bool,
    say: Callable[[str], None],
    progress: Progress | None,
) -> dict[str, Any]:
    """Makes one scene's files, and returns what its record holds."""
    start = time.perf_counter()
    files.record.unlink(missing_ok=True)  # it speaks of files that are about to change
    files.probabilities.unlink(missing_ok=True)
    tags = {TAG: f"{about['run']} {about['checkpoint']}"}
    made = map_scene(
        engine, scene, files.labels, files.probabilities if probabilities else None, tags=tags, progress=progress
    )
    look(files.look, scene, engine.reads, files.labels)
    seconds = time.perf_counter() - start
    record = about | {
        "made_by": MADE_BY,
        "version": __version__,
        "probabilities": probabilities,
        "size": list(size),
        **_contents(made, engine.reads.spec, files.labels),
        "seconds": round(seconds, 2),
    }
    write_atomically(files.record, json.dumps(record, indent=1) + "\n")
    say(f"{files.labels}: {size[1]} x {size[0]} pixels in {seconds:.1f} s")
    return record


def _contents(made: Mapped, spec: DatasetSpec, labels: Path) -> dict[str, Any]:
    """Pixels, share of the pixels with data, and area of each class."""
    area, total = raster.pixel_area(raster.info(labels).georeference), sum(made.classes)
    return {
        "pixels": dict(zip(spec.class_names, made.classes, strict=True)),
        "no_data_pixels": made.no_data,
        "share": {c: n / total if total else None for c, n in zip(spec.class_names, made.classes, strict=True)},
        "area_m2": area and {c: n * area for c, n in zip(spec.class_names, made.classes, strict=True)},
    }


def _inputs(scene: Scene) -> list[dict[str, Any]]:
    """The files that a map is made from, and by what one sees that they have changed."""
    return [
        {"sensor": name, "date": t, "file": str(path.resolve()), "bytes": at.st_size, "mtime_ns": at.st_mtime_ns}
        for name, paths in scene.files.items()
        for t, path in enumerate(paths)
        if path is not None
        for at in [path.stat()]
    ]


# --- Files that are there already


def _outputs(out: Path, name: str) -> Outputs:
    return Outputs(*(out / f"{name}{end}" for end in (".tif", "_probabilities.tif", ".png", ".json")))


def _check_outputs(scenes: Sequence[Scene], outputs: Sequence[Outputs], out: Path, overwrite: bool) -> None:
    """Makes `out`; UserError where a file would be written over that is an input, another scene's, or not ours."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; --out takes a folder that may be written to.") from e
    inputs = {_identity(path) for scene in scenes for path in scene.paths}
    taken: dict[Path, str] = {}
    for scene, files in zip(scenes, outputs, strict=True):
        for path in files:
            if path in taken:
                raise UserError(f"{path} would be written for scenes {taken[path]} and {scene.name}: rename one.")
            taken[path] = scene.name
            if path.exists() and _identity(path) in inputs:
                raise UserError(f"{path} is an input and would be written over: another --out is needed.")
        in_the_way = [path for path in files if path.exists()]
        if in_the_way and not overwrite and not _ours(files, in_the_way):
            raise UserError(
                f"{in_the_way[0]} was not made by sarjax predict: another --out, or --overwrite, would be accepted."
            )


def _identity(path: Path) -> tuple[int, int]:
    at = os.stat(path)
    return at.st_dev, at.st_ino


def _ours(files: Outputs, there: Iterable[Path]) -> bool:
    """Whether what is there is a map of ours, also one that was interrupted before its record was written."""
    if files.record.exists():
        return _read(files.record) is not None
    rasters = [path for path in there if path in (files.labels, files.probabilities)]
    return bool(rasters) and all(map(_is_tagged, rasters))


def _is_tagged(path: Path) -> bool:
    try:
        with raster.open_raster(path) as f:
            return TAG in f.tags()
    except UserError:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """A record of ours, or None."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("made_by") == MADE_BY else None


def _finished(files: Outputs, about: dict[str, Any], probabilities: bool) -> dict[str, Any] | None:
    """The record of a map that is `about` the same, whole, and holds what is asked for; else None."""
    record = _read(files.record)
    if record is None or any(record.get(key) != value for key, value in about.items()):
        return None
    if probabilities and not record.get("probabilities"):
        return None
    needed = [files.labels, files.look, *([files.probabilities] if record.get("probabilities") else [])]
    return record if all(path.is_file() for path in needed) else None


# --- The look


def look(path: Path, scene: Scene, reads: Reads, labels: Path, side: int = 1024) -> Path:
    """A PNG of what the network read beside the map in colour, with a legend; drawn from the files.

    side: pixels of the longer side of each picture, at most; larger scenes are thinned out.
    """
    from sarjax.data.imagery import decibel
    from sarjax.reports.drawing import display, figure, legend, paint, save

    with raster.open_raster(labels) as f:
        found = f.thumbnail(side)[..., 0]
    pictures = {}
    for name, paths in scene.files.items():
        modality = reads.spec.modality(name)
        for t in reads.dates:
            with raster.open_raster(paths[t]) as f:
                image, no_data = f.thumbnail(side), f.info.no_data
            valid = (found != IGNORE_LABEL) & np.isfinite(image).all(-1)
            for value in (no_data, modality.no_data):
                valid &= True if value is None else ~(image == value).all(-1)
            for transform in modality.transforms:
                if transform.name == "db":
                    image, valid = decibel(image.astype(np.float32), valid, transform)
            date = f", date {t + 1}" if reads.spec.dates > 1 else ""
            pictures[f"{name}{date}"] = display(image, valid, modality)
    pictures["map (white: no data)" if (found == IGNORE_LABEL).any() else "map"] = paint(found, reads.spec)

    height, width = found.shape
    inches = side / 130 / max(height, width)
    # Wide enough for the legend, however narrow the scene is.
    across = max(max(1.5, width * inches) * len(pictures) + 0.3, 1.2 * min(reads.spec.num_classes, 8))
    fig = figure(figsize=(across, max(1.5, height * inches) + 0.9))
    for ax, (title, picture) in zip(fig.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()
    legend(fig, reads.spec, ignored=False)
    return save(fig, path)
