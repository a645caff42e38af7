"""From the rasters of a scene to its map, by window: GeoTIFF out, in memory that does not grow with the scene.

One thread reads ahead, the device works on a batch of windows, and another thread puts windows together and writes
what is finished.
"""

import contextlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.raster import Window
from sarjax.scenes.blending import Blender
from sarjax.scenes.inputs import Reads, Scene, SceneReader, open_scene, scene_statistics
from sarjax.scenes.rasters import Mapped, Worker, create_map
from sarjax.scenes.stages import Stages
from sarjax.scenes.windows import Axis, Windows, grid

BEHIND = 2  # windows that may wait to be put together and written

Apply = Callable[[Mapping[str, np.ndarray]], Any]
Progress = Callable[[str, int, int], None]


class Engine(NamedTuple):
    """What makes maps, whatever the scene.

    apply: (batch of `rows` windows) -> probabilities (rows, h, w, k); may return before they are there, as jax does.
    context: of what `apply` runs. by_scene: batches carry each scene's own statistics ("tile" normalisation).
    classify: (batch) -> its most probable classes (rows, h, w) uint8; asked instead of `apply` where that is all a map
    needs, if there is one.
    """

    apply: Apply
    reads: Reads
    context: FieldOfView
    windows: Windows
    rows: int
    by_scene: bool = False
    classify: Apply | None = None


def map_scene(
    engine: Engine,
    scene: Scene,
    labels: Path,
    probabilities: Path | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    stages: Stages | None = None,
) -> Mapped:
    """Writes the map of `scene` to `labels`, and the probability of each class to `probabilities`.

    labels: one uint8 band in the data set's palette, 255 = no-data: nothing was seen there by any sensor. The other:
    a float32 band per class, NaN = no-data. Both lie where the scene does and appear when they are whole; what of a
    row of windows waits for the next one lies in a folder beside them in the meantime. stages: where the time goes.

    Raises:
      UserError: a raster that does not fit or cannot be read, or a file that cannot be written.
    """
    tell, stages = progress or (lambda stage, done, total: None), stages or Stages()
    spec, radius, windows = engine.reads.spec, engine.context.radius, engine.windows
    # Windows that agree on what they share need not be weighted: their classes do, of a byte instead of k numbers.
    if probabilities is None and engine.classify is not None and windows.cover(radius):
        apply, channels, dtype = engine.classify, 1, np.uint8
    else:
        apply, channels, dtype = engine.apply, spec.num_classes, np.float32
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(_beside(labels)))
        reader = stack.enter_context(Worker("reader"))
        writer = stack.enter_context(Worker("writer", closing=stages("write")))
        source: SceneReader = reader.open(open_scene(scene, engine.reads))
        shared: dict[str, np.ndarray] = {}
        if engine.by_scene:
            with stages("read"):
                shared = reader.submit(scene_statistics, source, partial(tell, f"{scene.name} statistics")).result()
        rows, columns = grid(source.height, source.width, windows, engine.context, engine.rows)
        blender = Blender(rows, columns, windows.overlap, radius, channels, folder, dtype)
        files = create_map(writer, source, labels, probabilities, spec, tags)

        def finish(answer: _Answer) -> np.ndarray:
            with stages("blend"), _spilling(folder):
                part, values = blender.add(answer.row, answer.column, answer.values)
                # `valid` is of the window that finished the part, whose first pixel is the part's.
                here = slice(part.height), slice(part.width)
                seen = np.zeros((part.height, part.width), bool) if answer.valid is None else answer.valid[here]
                classes = values[..., 0] if apply is engine.classify else values.argmax(-1)
            with stages("write"):
                return files.write(part, classes, values, seen)

        found, finishing = np.zeros(256, np.int64), deque[Future]()
        samples = _read(reader, source, rows, columns, 2 * engine.rows, stages)
        total = len(rows.origins) * len(columns.origins)
        for done, answer in enumerate(_predict(apply, engine.rows, samples, shared, stages)):
            finishing.append(writer.submit(finish, answer))
            if len(finishing) > BEHIND:
                found += finishing.popleft().result()
            tell(scene.name, done + 1, total)
        found += sum(future.result() for future in finishing)
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


def _read(
    thread: Worker, source: SceneReader, rows: Axis, columns: Axis, ahead: int, stages: Stages
) -> Iterator[_Sample]:
    """The scene's windows, row by row, at most `ahead` of them waiting."""

    def one(i: int, j: int) -> _Sample:
        with stages("read"):
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


def _predict(
    apply: Apply, rows: int, samples: Iterable[_Sample], shared: Mapping[str, np.ndarray], stages: Stages
) -> Iterator[_Answer]:
    """What `apply` says of windows, (h, w, k), in order. Those that saw nothing are left out of the batches.

    The next batch is given to the device before the last one's results are waited for.
    """
    flying = deque[tuple[list[_Sample], Any, float]]()
    group: list[_Sample] = []
    ready = 0.0  # when the last results were there

    def depart() -> None:
        full = [s.batch for s in group if s.batch is not None]
        result, since = None, time.perf_counter()
        if full:
            with stages("prepare"):
                full += [full[-1]] * (rows - len(full))
                batch = {name: np.stack([b[name] for b in full]) for name in full[0]}
                batch |= {name: np.repeat(x[None], rows, 0) for name, x in shared.items()}
            # Host devices may keep the caller until they have done what came before: that is no preparation.
            since = time.perf_counter()
            result = apply(batch)
        flying.append(([s._replace(batch=None) for s in group], result, since))
        group.clear()

    def land() -> Iterator[_Answer]:
        nonlocal ready
        landed, result, since = flying.popleft()
        values: Iterator[np.ndarray] = iter(())
        if result is not None:
            jax.block_until_ready(result)
            since, ready = max(since, ready), time.perf_counter()
            stages.add("compute", ready - since)
            values = _by_row(result)
        for s in landed:
            yield _Answer(s.row, s.column, s.valid, None if s.valid is None else next(values))

    waiting = 0
    for sample in samples:
        group.append(sample)
        waiting += sample.batch is not None
        if waiting == rows:
            depart()
            waiting = 0
            if len(flying) > 1:
                yield from land()
    depart()
    while flying:
        yield from land()


def _by_row(result: Any) -> Iterator[np.ndarray]:
    """Rows of probabilities (rows, h, w, k) or classes (rows, h, w) on the host, (h, w, k), without one large copy."""
    parts = [result]
    if isinstance(result, jax.Array):
        parts = [s.data for s in sorted(result.addressable_shards, key=lambda s: s.index[0].start or 0)]
    for part in parts:
        for row in np.asarray(part):
            yield row if row.ndim == 3 else row[..., None]


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
