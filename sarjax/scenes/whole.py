"""From the rasters of a scene to its map at once: the scene is one image in strips over devices, without any seam.

Every device holds a strip of rows, as many as the others; what its network looks at beyond them comes from its
neighbours while it computes (`sarjax.models.strips`). So memory per device falls with their number, and the map is that
of the whole image, as "inference on the whole image" is meant in `sarjax.scenes.windows`.
"""

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sarjax import raster
from sarjax.errors import UserError
from sarjax.machine import available_memory
from sarjax.models.context import FieldOfView
from sarjax.models.strips import strips
from sarjax.raster import Window
from sarjax.scenes.classes import most_probable
from sarjax.scenes.inputs import Reads, Scene, SceneReader, open_scene, scene_statistics
from sarjax.scenes.rasters import MapFiles, Mapped, Worker, create_map
from sarjax.scenes.stages import Stages

Predict = Callable[[Any, Any, Mapping[str, Any]], Any]
Progress = Callable[[str, int, int], None]
GIB = 2**30
BEHIND = 2  # rows of blocks that may wait to be written


class Layout(NamedTuple):
    """A scene of height x width pixels as an image of `rows` x `columns`, in `strips` of `depth` rows.

    rows, columns: with no-data below and to the right, up to multiples of the network's alignment. The strips reach
    beyond, where `depth` asks for it: what lies there is no part of the image.
    """

    height: int
    width: int
    rows: int
    columns: int
    strips: int
    depth: int

    @property
    def padded(self) -> int:
        return self.strips * self.depth


def lay(height: int, width: int, alignment: int, strips: int) -> Layout:
    """The layout of a scene for a network of this alignment on as many devices as strips."""
    rows, columns = (-(-n // alignment) * alignment for n in (height, width))
    return Layout(height, width, rows, columns, strips, -(-rows // (alignment * strips)) * alignment)


class Whole:
    """What makes maps of whole scenes.

    predict: (params, stats, batch) -> logits (b, h, w, k), by a network of this `context`. variables: params and stats,
    whole on each device of `mesh`, whose axis "space" has a device per strip and whose other axes are 1. by_scene: as
    in `sarjax.scenes.predict.Engine`. window: side of the windows that the network would get instead.
    """

    def __init__(
        self,
        predict: Predict,
        variables: tuple[Any, Any],
        reads: Reads,
        context: FieldOfView,
        mesh: jax.sharding.Mesh,
        *,
        by_scene: bool,
        window: int,
    ):
        self.predict, self.variables, self.reads, self.context = predict, variables, reads, context
        self.by_scene, self.window = by_scene, window
        self.devices = list(mesh.devices.flat)
        self.common = NamedSharding(mesh, PartitionSpec())
        self.by_rows = NamedSharding(mesh, PartitionSpec(None, "space"))
        self.by_rows_of_dates = NamedSharding(mesh, PartitionSpec(None, None, "space"))
        self.program = functools.lru_cache(1)(self._compiled)  # scenes of one size tend to come together

    def lay(self, height: int, width: int) -> Layout:
        return lay(height, width, self.context.alignment, len(self.devices))

    def _compiled(self, layout: Layout, probabilities: bool) -> Any:
        """(params, stats, batch) -> labels (1, h, w) uint8 and, where wanted, probabilities (1, h, w, k), in strips."""

        def program(params: Any, stats: Any, batch: Mapping[str, Any]) -> tuple[Any, ...]:
            with strips(layout.rows, layout.padded):
                scores = self.predict(params, stats, batch).astype(jnp.float32)
            labels = most_probable(scores)
            return (labels, jax.nn.softmax(scores, -1)) if probabilities else (labels,)

        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=self.common), self.variables
        )
        jitted = jax.jit(program, out_shardings=self.by_rows)
        return jitted.lower(*shapes, self.batch_shapes(layout)).compile()

    def batch_shapes(self, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
        """What `predict` reads of a scene of that layout, as one row of a batch."""
        spec, out = self.reads.spec, {}
        for name in self.reads.modalities:
            modality = spec.modality(name)
            shape, bands = (1, spec.dates, layout.padded, layout.columns), len(modality.bands)
            out[name] = jax.ShapeDtypeStruct((*shape, bands), modality.dtype, sharding=self.by_rows_of_dates)
            out[f"{name}_valid"] = jax.ShapeDtypeStruct(shape, np.uint8, sharding=self.by_rows_of_dates)
            if self.by_scene:
                for what in ("mean", "std"):
                    shape = (1, spec.dates, bands)
                    out[f"{name}_{what}"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=self.common)
        return out


def map_whole(
    whole: Whole,
    scene: Scene,
    labels: Path,
    probabilities: Path | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    stages: Stages | None = None,
) -> Mapped:
    """Writes the map of `scene` to `labels`, and the probability of each class to `probabilities`.

    The files are those of `sarjax.scenes.predict.map_scene`, and appear when they are whole. Nothing is computed where
    the compiler says that the devices' memory would not do.

    Raises:
      UserError: as there; a scene that does not fit in memory, with what would.
    """
    tell, stages = progress or (lambda stage, done, total: None), stages or Stages()
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Worker("reader"))
        writer = stack.enter_context(Worker("writer", closing=stages("write")))
        source: SceneReader = reader.open(open_scene(scene, whole.reads))
        layout = whole.lay(source.height, source.width)
        program = whole.program(layout, probabilities is not None)
        check_memory(whole, scene.name, layout, program, say)
        shared: dict[str, np.ndarray] = {}
        if whole.by_scene:
            with stages("read"):
                shared = reader.submit(scene_statistics, source, partial(tell, f"{scene.name} statistics")).result()
        batch, seen = _put(whole, layout, reader, source, partial(tell, f"{scene.name} reading"), stages)
        batch |= {name: jax.device_put(x[None], whole.common) for name, x in shared.items()}
        files = create_map(writer, source, labels, probabilities, whole.reads.spec, tags)
        with _memory_of(scene.name):
            with stages("compute"):
                answers = jax.block_until_ready(program(*whole.variables, batch))
            del batch
            found = _write(
                writer, files, layout, [_Strips(x, layout) for x in answers], seen, partial(tell, scene.name), stages
            )
    return Mapped.counted(found, whole.reads.spec.num_classes)


def _put(
    whole: Whole,
    layout: Layout,
    reader: Worker,
    source: SceneReader,
    tell: Callable[[int, int], None],
    stages: Stages,
) -> tuple[dict[str, jax.Array], list[np.ndarray]]:
    """The scene on its devices, read strip by strip, and where anything was seen, (depth, columns) of each strip."""
    shapes = {name: s for name, s in whole.batch_shapes(layout).items() if len(s.shape) > 3}
    parts: dict[str, list[jax.Array]] = {name: [] for name in shapes}
    seen = []

    def read(i: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        with stages("read"):
            return source.read(Window(i * layout.depth, 0, layout.depth, layout.columns))

    coming = reader.submit(read, 0)
    for i, device in enumerate(whole.devices):
        strip, valid = coming.result()
        if i + 1 < layout.strips:
            coming = reader.submit(read, i + 1)
        with stages("prepare"):
            for name, held in parts.items():
                held.append(jax.device_put(strip[name][None], device))
        seen.append(valid)
        tell(i + 1, layout.strips)
    # All of a strip comes from one reading, for which `make_array_from_callback`, an array at a time, has no room.
    make = jax.make_array_from_single_device_arrays
    return {name: make(s.shape, s.sharding, parts[name]) for name, s in shapes.items()}, seen


class _Strips:
    """What lies in strips on devices, by rows, on the host; a strip is copied once while rows go down."""

    def __init__(self, x: jax.Array, layout: Layout):
        self._shards = sorted(x.addressable_shards, key=lambda shard: shard.index[1].start or 0)
        self._depth, self._width = layout.depth, layout.width
        self._held: dict[int, np.ndarray] = {}

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last = rows.start // self._depth, (rows.stop - 1) // self._depth
        wanted = range(first, last + 1)
        self._held = {i: self._held[i] if i in self._held else np.asarray(self._shards[i].data)[0] for i in wanted}
        start = first * self._depth
        parts = [self._held[i][:, : self._width] for i in wanted]
        return np.concatenate(parts)[rows.start - start : rows.stop - start]


def _write(
    writer: Worker,
    files: MapFiles,
    layout: Layout,
    answers: Sequence[_Strips],
    seen: Sequence[np.ndarray],
    tell: Callable[[int, int], None],
    stages: Stages,
) -> np.ndarray:
    """Writes the map by rows of blocks; how often each value occurs in it, (256,)."""
    found, there = np.zeros(256, np.int64), np.concatenate(seen)[: layout.height, : layout.width]

    def write(*arguments: Any) -> np.ndarray:
        with stages("write"):
            return files.write(*arguments)

    tops, writing = range(0, layout.height, raster.BLOCK), deque[Future]()
    for i, top in enumerate(tops):
        rows = slice(top, min(top + raster.BLOCK, layout.height))
        with stages("blend"):
            labels, *values = (answer[rows] for answer in answers)
        part = Window(top, 0, rows.stop - top, layout.width)
        writing.append(writer.submit(write, part, labels, values[0] if values else None, there[rows]))
        if len(writing) > BEHIND:
            found += writing.popleft().result()
        tell(i + 1, len(tops))
    return found + sum(future.result() for future in writing)


# --- Memory


class Footprint(NamedTuple):
    """Bytes on each device, as the compiler counts them: of the parameters, and of a strip of `pixels`."""

    parameters: int
    strip: int
    pixels: int

    @property
    def total(self) -> int:
        return self.parameters + self.strip

    def at(self, pixels: int) -> int:
        """About as many bytes for a strip or window of `pixels`: as much for each of them."""
        return self.parameters + self.strip * pixels // self.pixels


def footprint(program: Any, whole: Whole, layout: Layout) -> Footprint | None:
    """What the compiled `program` takes; None where this backend does not say."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.variables))
    return Footprint(parameters, total - memory.alias_size_in_bytes - parameters, layout.depth * layout.columns)


def check_memory(whole: Whole, name: str, layout: Layout, program: Any, say: Callable[[str], None]) -> None:
    """Says what a scene takes; UserError, with what would fit, where the devices have less."""
    taken = footprint(program, whole, layout)
    if taken is None:
        return
    devices = f"{layout.strips} device" + "s" * (layout.strips > 1)
    say(
        f"{name}: one image of {layout.columns} x {layout.rows} pixels on {devices}, {_gib(taken.total)} each by the "
        "compiler's count"
    )
    memory = partial(memory_per_device, whole.devices[0])
    available = memory(layout.strips)
    if available is None or taken.total <= available:
        return
    raise UserError(
        f"{name} would take {_gib(taken.total)} on each of {devices}, of which each has {_gib(available)}: "
        f"{what_fits(taken, layout, whole.context.alignment, whole.window, memory, jax.local_device_count())}."
    )


def memory_per_device(device: jax.Device, sharers: int) -> int | None:
    """Bytes that a device has; of host devices, the share of the machine's free memory. None = not known."""
    if device.platform == "cpu":
        free = available_memory()
        return None if free is None else free // sharers
    return (device.memory_stats() or {}).get("bytes_limit")


def what_fits(
    taken: Footprint,
    layout: Layout,
    alignment: int,
    window: int,
    memory: Callable[[int], int | None],
    devices: int,
) -> str:
    """What would be accepted instead of `layout`, estimated from what a pixel of it takes.

    window: side of the windows by default. memory: of each of so many devices. devices: that there are.
    """
    fits = []
    for n in range(layout.strips + 1, devices + 1):
        more = lay(layout.height, layout.width, alignment, n)
        if taken.at(more.depth * more.columns) <= (memory(n) or 0):
            fits.append(f"--mesh.space {n}")
            break
    each = memory(devices) or 0
    room = max(0, each - taken.parameters) * taken.pixels // taken.strip
    side = min(window, math.isqrt(room) // alignment * alignment)
    if side:
        fits.append(f"{f'windows of {side} pixels' if side == window else f'--window {side}'} without --mesh.space")
    return f"by estimate, {' or '.join(fits)} would fit" if fits else "not even a small window would fit"


@contextlib.contextmanager
def _memory_of(name: str) -> Iterator[None]:
    """Memory that runs out nevertheless, in one sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(
            f"{name} does not fit in the devices' memory ({str(e).splitlines()[0]}); a larger --mesh.space, or windows "
            "(no --mesh.space), would take less of each."
        ) from e


def _gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB"
