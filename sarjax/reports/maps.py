"""Maps of whole scenes from a trained run: `sarjax predict`."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sarjax import __version__, raster
from sarjax import config as configs
from sarjax.errors import UserError
from sarjax.files import write_atomically
from sarjax.georeference import row_areas
from sarjax.reports.makers import Maker, by_windows, choose_windows, in_strips
from sarjax.scenes.inputs import Reads, Scene, open_scene, pair_scenes, parse_scenes
from sarjax.scenes.outputs import MADE_BY, TAG, Outputs, check_places, decide, outputs_of, publish, workplace
from sarjax.scenes.predict import Progress
from sarjax.scenes.rasters import Mapped
from sarjax.spec import IGNORE_LABEL, DatasetSpec

if TYPE_CHECKING:
    import jax

    from sarjax.train.run import Restored


class Task(NamedTuple):
    """A scene to be mapped: its size, its files, what its map depends on, and what there is to do.

    done: the record of a map that is there already; probabilities: whether they are to be made.
    """

    scene: Scene
    size: tuple[int, int]
    files: Outputs
    about: dict[str, Any]
    done: dict[str, Any] | None
    probabilities: bool


def predict_run(
    run: Path,
    scenes: Sequence[str],
    out: Path,
    *,
    dates: tuple[str, str] | None = None,
    head: str = "",
    checkpoint: str = "best",
    ema: bool = False,
    window: int = 0,
    overlap: int | None = None,
    tta: bool = False,
    probabilities: bool = False,
    batch: int = 0,
    space: int = 0,
    allow_global: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Makes a map of each of `scenes` in the folder `out`, over all visible devices.

    All scenes are checked before the first map is made. A map of the same files by the same weights in the same way is
    left alone; where only the files have changed, or probabilities are asked for that it lacks, it is made again. A
    map appears when all of its files are whole. A scene whose data turn out to be damaged leaves what was there as it
    was, and the others go on.

    Args:
      run: the run's directory.
      scenes: as `sarjax.scenes.inputs.parse_scenes` reads them.
      out: made where it is not there.
      dates: of scenes of two dates, instead of `scenes`; as `sarjax.scenes.inputs.pair_scenes` reads them.
      head: of the method; "" = its first. checkpoint, ema: see `restore_run`.
      window, overlap: in pixels; 0 and None = by the network, see `sarjax.scenes.windows.choose`.
      tta: the mean over the eight symmetries of the square.
      probabilities: also write the probability of each class.
      batch: windows per device at a time; 0 = by the window's size.
      space: devices that share each scene, which is then one image instead of windows (`sarjax.scenes.whole`);
        -1 = all, 0 = windows.
      allow_global: with `space`, also networks that take means of the whole image.
      overwrite: makes every map again (and the probabilities that it had), also those made with other settings or from
        other files, and replaces files in `out` that are no maps of ours. Never an input.
      progress: called as (stage, done, total).

    Returns:
      What each <scene>.json holds, in the order of the scenes.

    Raises:
      UserError: settings that contradict each other, a scene that does not fit the run, maps or files that are in the
        way, a folder that cannot be written to or in which another call makes maps; at the end, the scenes that could
        not be mapped.
    """
    from sarjax.train.run import restore_run

    run, out, mesh = Path(run), Path(out), _mesh(space)
    if space:
        _check_whole({"--window": window, "--overlap": overlap is not None, "--batch": batch, "--tta": tta})
    elif allow_global:
        raise UserError("--allow-global is given without --mesh.space, the devices of one scene; both are accepted.")
    restored = restore_run(run, mesh, checkpoint=checkpoint, ema=ema, say=say)
    name, _ = restored.head(head)
    if space:
        maker = in_strips(run, restored, name, mesh, allow_global=allow_global, say=say)
    else:
        windows = choose_windows(run, restored, name, window, overlap, say)
        maker = by_windows(restored, name, mesh, windows, batch=batch, tta=tta)
    settings = _settings(run, restored, name, maker, ema)
    parsed = pair_scenes(*dates, maker.reads, say) if dates else parse_scenes(scenes, maker.reads, say)
    sizes = [_size(scene, maker.reads) for scene in parsed]

    def tasks() -> list[Task]:
        return _tasks(parsed, sizes, out, settings, probabilities, overwrite)

    todo = tasks()
    with contextlib.ExitStack() as stack:
        if not all(task.done for task in todo):
            work = stack.enter_context(workplace(out))
            todo = tasks()  # from here on nobody else changes the maps
        else:
            work = out
        return _each(maker, todo, work, say, progress)


def _mesh(space: int) -> "jax.sharding.Mesh":
    """All devices for rows of a batch, or, for one scene, so many of them, -1 = all."""
    import jax

    from sarjax.config import Mesh
    from sarjax.train.mesh import make_mesh

    if not space:
        return make_mesh(Mesh())
    devices = jax.devices()
    if space < -1 or space > len(devices):
        raise UserError(
            f"--mesh.space is {space}; 1 to {len(devices)}, the devices there are, or -1 for all, is accepted."
        )
    return make_mesh(Mesh(1, 1, len(devices) if space == -1 else space))


def _check_whole(given: Mapping[str, Any]) -> None:
    """UserError for options of windows beside --mesh.space."""
    for option, value in given.items():
        if value:
            raise UserError(
                f"{option} is given beside --mesh.space, which maps a scene as one image, neither cut into windows nor "
                "turned; one of the two is accepted."
            )


def _settings(run: Path, restored: "Restored", name: str, maker: Maker, ema: bool) -> dict[str, Any]:
    """What a map depends on besides its input files."""
    experiment = configs.to_json(restored.config.experiment)
    return {
        "run": str(run.resolve()),
        "experiment": hashlib.sha256(experiment.encode()).hexdigest()[:16],
        "checkpoint": restored.checkpoint,
        "step": restored.step,
        "ema": ema,
        "head": name,
        **maker.about,
        "weights": _digest((restored.params, restored.stats)),
    }


def _digest(tree: Any) -> str:
    """sha256 over the leaves of a tree: their paths, types, shapes and bytes."""
    import jax

    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _tasks(
    scenes: Sequence[Scene],
    sizes: Sequence[tuple[int, int]],
    out: Path,
    settings: dict[str, Any],
    probabilities: bool,
    overwrite: bool,
) -> list[Task]:
    """What there is to do for each scene; UserError where something is in the way of any."""
    outputs = [outputs_of(out, scene.name) for scene in scenes]
    check_places(scenes, outputs, probabilities, overwrite)
    tasks = []
    for scene, size, files in zip(scenes, sizes, outputs, strict=True):
        about = settings | {"inputs": _inputs(scene)}
        tasks.append(Task(scene, size, files, about, *decide(files, about, probabilities, overwrite)))
    return tasks


def _each(
    maker: Maker,
    tasks: Sequence[Task],
    work: Path,
    say: Callable[[str], None],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """The records of all scenes; UserError at the end that names those that could not be mapped."""
    records, failures = [], []
    for task in tasks:
        if task.done:
            say(f"{task.files.labels} is there already, made from the same files in the same way")
            records.append(task.done)
            continue
        try:
            records.append(_make(maker, task, work, say, progress))
        except UserError as e:
            failures.append(str(e).replace(str(work), str(task.files.labels.parent)))  # which will be gone
            for path in outputs_of(work, task.scene.name):
                path.unlink(missing_ok=True)  # the next scene may need the room
            if len(tasks) > 1:
                say(f"no map of {task.scene.name}: {failures[-1]}")
    if failures:
        raise UserError(failures[0] if len(tasks) == 1 else _summary(len(tasks), failures))
    return records


def _summary(total: int, failures: Sequence[str]) -> str:
    rest = "; ".join(text.rstrip(".") for text in failures)
    return f"{len(failures)} of {total} scenes could not be mapped, the others are done: {rest}."


def _size(scene: Scene, reads: Reads) -> tuple[int, int]:
    with open_scene(scene, reads) as source:
        return source.height, source.width


def _make(
    maker: Maker, task: Task, work: Path, say: Callable[[str], None], progress: Progress | None
) -> dict[str, Any]:
    """Makes one scene's files in `work`, moves them to their places, and returns what its record holds."""
    start = time.perf_counter()
    scene, about, made = task.scene, task.about, outputs_of(work, task.scene.name)
    tags = {TAG: f"{about['run']} {about['checkpoint']}"}
    probabilities = made.probabilities if task.probabilities else None
    mapped = maker.make(scene, task.size, made.labels, probabilities, tags, progress)
    look(made.look, scene, maker.reads, made.labels)
    seconds = time.perf_counter() - start
    record = about | {
        "made_by": MADE_BY,
        "version": __version__,
        "probabilities": task.probabilities,
        "size": list(task.size),
        **maker.notes,
        **_contents(mapped, maker.reads.spec, made.labels),
        "seconds": round(seconds, 2),
    }
    write_atomically(made.record, json.dumps(record, indent=1) + "\n")
    publish(made, task.files)
    say(f"{task.files.labels}: {task.size[1]} x {task.size[0]} pixels in {seconds:.1f} s")
    return record


def _contents(made: Mapped, spec: DatasetSpec, labels: Path) -> dict[str, Any]:
    """Pixels, share of the pixels with data, and area of each class."""
    total, areas = sum(made.classes), _class_areas(labels, spec.num_classes)
    return {
        "pixels": dict(zip(spec.class_names, made.classes, strict=True)),
        "no_data_pixels": made.no_data,
        "share": {c: n / total if total else None for c, n in zip(spec.class_names, made.classes, strict=True)},
        "area_m2": areas and dict(zip(spec.class_names, areas, strict=True)),
    }


def _class_areas(labels: Path, num_classes: int) -> list[float] | None:
    """Square metres of each class in a map, read strip by strip; None where the size of its pixels is not known."""
    with raster.open_raster(labels) as f:
        height, width = f.info.height, f.info.width
        by_row = row_areas(f.info.georeference, height)
        if by_row is None:
            return None
        total = np.zeros(num_classes)
        for top in range(0, height, raster.BLOCK):
            rows = min(raster.BLOCK, height - top)
            found = f.read((top, 0, rows, width))[..., 0]
            counts = np.stack([np.bincount(row, minlength=256) for row in found])[:, :num_classes]
            total += by_row[top : top + rows] @ counts
    return total.tolist()


def _inputs(scene: Scene) -> list[dict[str, Any]]:
    """The files that a map is made from, and by what one sees that they have changed."""
    return [
        {"sensor": name, "date": t, "file": str(path.resolve()), "bytes": at.st_size, "mtime_ns": at.st_mtime_ns}
        for name, paths in scene.files.items()
        for t, path in enumerate(paths)
        if path is not None
        for at in [path.stat()]
    ]


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
