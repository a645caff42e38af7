"""From the rasters of a scene to its map, by window: GeoTIFF out, in memory that does not grow with the scene.

One thread reads ahead, the device works on a batch of windows, and another thread writes what is finished.
"""

import contextlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.raster import Window
from sarjax.scenes.blending import Blender, Finished
from sarjax.scenes.inputs import Reads, Scene, SceneReader, open_scene, scene_statistics
from sarjax.scenes.rasters import MapFiles, Mapped, Worker, create_map
from sarjax.scenes.windows import Axis, Windows, cut

BEHIND = 2  # regions that may wait to be written

Apply = Callable[[Mapping[str, np.ndarray]], Any]
Progress = Callable[[str, int, int], None]


class Engine(NamedTuple):
    """What makes maps, whatever the scene.

    apply: (batch of `rows` windows) -> probabilities (rows, h, w, k); may return before they are there, as jax does.
    context: of what `apply` runs. by_scene: batches carry each scene's own statistics ("tile" normalisation).
    """

    apply: Apply
    reads: Reads
    context: FieldOfView
    windows: Windows
    rows: int
    by_scene: bool = False


def map_scene(
    engine: Engine,
    scene: Scene,
    labels: Path,
    probabilities: Path | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Mapped:
    """Writes the map of `scene` to `labels`, and the probability of each class to `probabilities`.

    labels: one uint8 band in the data set's palette, 255 = no-data: nothing was seen there by any sensor. The other:
    a float32 band per class, NaN = no-data. Both lie where the scene does and appear when they are whole; what of a
    row of windows waits for the next one lies in a folder beside them in the meantime.

    Raises:
      UserError: a raster that does not fit or cannot be read, or a file that cannot be written.
    """
    tell = progress or (lambda stage, done, total: None)
    spec, alignment = engine.reads.spec, engine.context.alignment
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(_beside(labels)))
        reader, writer = stack.enter_context(Worker("reader")), stack.enter_context(Worker("writer"))
        source: SceneReader = reader.open(open_scene(scene, engine.reads))
        shared: dict[str, np.ndarray] = {}
        if engine.by_scene:
            shared = reader.submit(scene_statistics, source, partial(tell, f"{scene.name} statistics")).result()
        rows, columns = (cut(n, engine.windows, alignment) for n in (source.height, source.width))
        blender = Blender(rows, columns, engine.windows.overlap, engine.context.radius, spec.num_classes, folder)
        files = create_map(writer, source, labels, probabilities, spec, tags)

        found, writing = np.zeros(256, np.int64), deque[Future]()
        samples = _read(reader, source, rows, columns, 2 * engine.rows)
        total = len(rows.origins) * len(columns.origins)
        for done, answer in enumerate(_predict(engine, samples, shared)):
            with _spilling(folder):
                finished = blender.add(answer.row, answer.column, answer.values)
            writing.append(writer.submit(_write, files, finished, answer.valid))
            if len(writing) > BEHIND:
                found += writing.popleft().result()
            tell(scene.name, done + 1, total)
        found += sum(future.result() for future in writing)
    return Mapped.counted(found, spec.num_classes)


class _Sample(NamedTuple):
    row: int
    column: int
    batch: dict[str, np.ndarray] | None  # None where nothing was seen
    valid: np.ndarray | None


class _Answer(NamedTuple):
    row: int
    column: int
    valid: np.ndarray | None
    values: np.ndarray | None


def _read(thread: Worker, source: SceneReader, rows: Axis, columns: Axis, ahead: int) -> Iterator[_Sample]:
    """The scene's windows, row by row, at most `ahead` of them waiting."""

    def one(i: int, j: int) -> _Sample:
        batch, valid = source.read(Window(rows.origins[i], columns.origins[j], rows.length, columns.length))
        return _Sample(i, j, batch, valid) if valid.any() else _Sample(i, j, None, None)

    pending = deque[Future]()
    for i in range(len(rows.origins)):
        for j in range(len(columns.origins)):
            pending.append(thread.submit(one, i, j))
            if len(pending) > ahead:
                yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _predict(engine: Engine, samples: Iterable[_Sample], shared: Mapping[str, np.ndarray]) -> Iterator[_Answer]:
    """Probabilities of windows, in order. Those that saw nothing are left out of the batches: they have none.

    The next batch is given to the device before the last one's results are waited for.
    """
    flying = deque[tuple[list[_Sample], Any]]()
    group: list[_Sample] = []

    def depart() -> None:
        full = [s.batch for s in group if s.batch is not None]
        result = None
        if full:
            full += [full[-1]] * (engine.rows - len(full))
            batch = {name: np.stack([b[name] for b in full]) for name in full[0]}
            batch |= {name: np.repeat(x[None], engine.rows, 0) for name, x in shared.items()}
            result = engine.apply(batch)
        flying.append(([s._replace(batch=None) for s in group], result))
        group.clear()

    def land() -> Iterator[_Answer]:
        landed, result = flying.popleft()
        values, row = None if result is None else np.asarray(result), 0
        for s in landed:
            seen = s.valid is not None
            yield _Answer(s.row, s.column, s.valid, values[row] if seen else None)
            row += seen

    waiting = 0
    for sample in samples:
        group.append(sample)
        waiting += sample.batch is not None
        if waiting == engine.rows:
            depart()
            waiting = 0
            if len(flying) > 1:
                yield from land()
    depart()
    while flying:
        yield from land()


def _write(files: MapFiles, finished: Finished, valid: np.ndarray | None) -> np.ndarray:
    """valid: of the window that finished the part, whose first pixel is the part's."""
    part, values = finished
    seen = np.zeros((part.height, part.width), bool) if valid is None else valid[: part.height, : part.width]
    return files.write(part, values.argmax(-1), values, seen)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[str]:
    """A folder beside `path` that is gone afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".windows-")
    except OSError as e:
        raise UserError(f"cannot write to {path.parent}: {e.strerror or e}; a writable folder is needed.") from e
    with folder as name:
        yield name


@contextlib.contextmanager
def _spilling(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        what = e.strerror or f"no room is left ({e})"  # numpy says nothing but how much it could not write
        raise UserError(f"cannot write to {folder.parent}: {what}; room for a row of windows is needed.") from e
