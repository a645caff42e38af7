"""One side of `sarjax.bench.scene` in a process of its own: `python -m sarjax.bench.scene_sides TASK`.

TASK: a `Task` in JSON. A line of JSON on stdout says what the side is when it is ready; then, for each line on stdin,
it maps the scene and says how long that took.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarjax.bench.worker import most_resident
from sarjax.errors import UserError
from sarjax.scenes.stages import Stages

SCENE, WEIGHTS, MAP, PROBABILITIES = "scene.tif", "weights.npz", "map.tif", "probabilities.tif"  # in a task's folder
BANDS, MEAN, STD = 2, 60.0, 45.0  # of the scene
TILE = 256  # of the training that did not take place
SAMPLE, LOOKS = 256, 40  # side of the noise that the network has seen, and how often

Work = Callable[[Stages], None]


class Task(NamedTuple):
    """What a side has to do; see `bench_scene`. folder: holds scene and weights, and `out` in it takes the maps."""

    side: str
    folder: str
    out: str
    height: int
    width: int
    network_width: float
    classes: int
    window: int
    batch: int
    devices: int
    probabilities: bool
    by_scene: bool
    figures: bool

    def path(self, name: str) -> Path:
        return Path(self.folder, name)

    @property
    def maps(self) -> tuple[Path, Path | None]:
        folder = Path(self.folder, self.out)
        return folder / MAP, folder / PROBABILITIES if self.probabilities else None


def options_of(width: float) -> Any:
    from sarjax.options import NetworkOptions

    return NetworkOptions.registry()["lanet"](width=width)


def save_weights(path: Path, width: float, classes: int) -> None:
    """Random weights {path of the leaf: array} of a network that has seen noise, and finds all classes in it.

    With running statistics as they start, all pixels would have nearly the same scores, and maps would differ by how
    sums are rounded.
    """
    import jax

    from sarjax.models import build_network
    from sarjax.train.mesh import flatten

    network = build_network(options_of(width), classes)
    image = jax.random.normal(jax.random.key(1), (1, SAMPLE, SAMPLE, BANDS))
    made = jax.jit(lambda key: network.init(key, image, False))(jax.random.key(0))
    params, stats = made["params"], made["batch_stats"]
    look = jax.jit(lambda p, s: network.apply({"params": p, "batch_stats": s}, image, True, mutable=["batch_stats"])[1])
    for _ in range(LOOKS):
        stats = look(params, stats)["batch_stats"]
    scores = jax.jit(lambda p, s: network.apply({"params": p, "batch_stats": s}, image, False).logits)(params, stats)
    params["low_classifier"]["bias"] -= scores.mean((0, 1, 2))
    leaves = flatten({"params": params, "batch_stats": stats})
    np.savez(path, **{name: np.asarray(leaf) for name, leaf in leaves.items()})


def load_weights(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(params, stats) of `save_weights`, as nested dicts of arrays."""
    tree: dict[str, Any] = {}
    with np.load(path) as file:
        for name in file.files:
            *parents, leaf = name.split("/")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            at[leaf] = file[name]
    return tree["params"], tree["batch_stats"]


# --- Ours


def _network(task: Task) -> tuple[Any, Any, Callable[..., Any]]:
    """(what it reads of scenes, its field of view, (params, stats, batch) -> logits)."""
    from sarjax.augment.inputs import network_inputs
    from sarjax.config import Inputs
    from sarjax.models import build_network
    from sarjax.scenes.inputs import Reads
    from sarjax.spec import BandSpec, BandStatistics, ClassSpec, DatasetSpec, ModalitySpec, Statistics

    bands = tuple(BandSpec(name, "amplitude") for name in ("VV", "VH"))
    classes = tuple(ClassSpec(str(i), (30 * i % 256, 0, 0)) for i in range(task.classes))
    spec = DatasetSpec("benchmark", (ModalitySpec("sar", bands),), classes)
    known = BandStatistics((MEAN,) * BANDS, (STD,) * BANDS, (0.0,) * BANDS, (255.0,) * BANDS, 1)
    statistics = Statistics({"sar": known}, (), {}, {})
    inputs = Inputs(normalisation="tile" if task.by_scene else "dataset")
    network = build_network(options_of(task.network_width), task.classes)

    def predict(params: Any, stats: Any, batch: Mapping[str, Any]) -> Any:
        x = network_inputs(batch, inputs, spec, statistics)
        return network.apply({"params": params, "batch_stats": stats}, x, train=False).logits

    return Reads(spec, ("sar",), (0,)), network.context, predict


def windows(task: Task) -> tuple[dict[str, Any], Work]:
    """(what there is to say, what maps the scene) of `sarjax predict`."""
    import jax

    from sarjax.reports.makers import PIXELS, batch_rows, on_devices
    from sarjax.scenes.inputs import Scene
    from sarjax.scenes.predict import Engine, map_scene
    from sarjax.scenes.windows import choose, grid
    from sarjax.train.mesh import replicated, row_shards

    mesh = _mesh_of(task)
    reads, context, predict = _network(task)
    variables = jax.device_put(load_weights(task.path(WEIGHTS)), replicated(mesh))
    chosen = choose(context, TILE, task.window)
    each = task.batch or max(1, PIXELS // chosen.side**2)
    apply, classify = on_devices(predict, variables, mesh)
    engine = Engine(apply, reads, context, chosen, each, task.by_scene, classify)
    size = task.height, task.width
    engine = engine._replace(rows=batch_rows(engine, size, row_shards(mesh)))
    rows, columns = grid(*size, chosen, context, engine.rows)
    facts = facts_of(rows, columns, chosen.overlap) | {"devices": mesh.size, "batch": engine.rows}
    if not task.figures:
        shape = engine.rows, 1, rows.length, columns.length
        batch = {"sar": np.zeros((*shape, BANDS), np.uint8), "sar_valid": np.zeros(shape, np.uint8)}
        if task.by_scene:
            batch |= {f"sar_{name}": np.ones((engine.rows, 1, BANDS), np.float32) for name in ("mean", "std")}
        direct = not task.probabilities and chosen.cover(context.radius)
        jax.block_until_ready((classify if direct else apply)(batch))
    scene = Scene("scene", {"sar": (task.path(SCENE),)})
    return facts, lambda stages: map_scene(engine, scene, *task.maps, stages=stages)


def facts_of(rows: Any, columns: Any, overlap: int) -> dict[str, Any]:
    """Of windows; computed: pixels that are, as often as the scene has them."""
    count = len(rows.origins) * len(columns.origins)
    return {
        "window": f"{rows.length}x{columns.length}",
        "overlap": overlap,
        "windows": count,
        "computed": count * rows.length * columns.length / (rows.size * columns.size),
    }


def whole(task: Task) -> tuple[dict[str, Any], Work]:
    """The same of `sarjax predict --mesh.space`."""
    import jax

    from sarjax.scenes.inputs import Scene
    from sarjax.scenes.whole import Whole, footprint, map_whole
    from sarjax.scenes.windows import choose
    from sarjax.train.mesh import replicated

    mesh = _mesh_of(task)
    reads, context, predict = _network(task)
    variables = jax.device_put(load_weights(task.path(WEIGHTS)), replicated(mesh))
    side = choose(context, TILE).side
    maker = Whole(predict, variables, reads, context, mesh, by_scene=task.by_scene, window=side)
    layout, start = maker.lay(task.height, task.width), time.perf_counter()
    program = maker.program(layout, task.probabilities)
    facts = {
        "devices": mesh.size,
        "computed": layout.padded * layout.columns / (task.height * task.width),
        "compilation_s": time.perf_counter() - start,
    }
    taken = footprint(program, maker, layout)
    if taken is not None:
        facts["compiler_mb_per_device"] = taken.total / 1e6
    if not task.figures:
        shapes = maker.batch_shapes(layout)
        batch = {name: jax.device_put(np.ones(s.shape, s.dtype), s.sharding) for name, s in shapes.items()}
        jax.block_until_ready(program(*variables, batch))
    scene = Scene("scene", {"sar": (task.path(SCENE),)})
    return facts, lambda stages: map_whole(maker, scene, *task.maps, stages=stages)


def _mesh_of(task: Task) -> Any:
    """The devices that share windows, or hold a strip each."""
    import jax

    from sarjax.config import Mesh
    from sarjax.train.mesh import make_mesh

    there = jax.devices()
    if task.side == "windows":
        return make_mesh(Mesh(), there[: task.devices])
    if task.devices > len(there):
        raise UserError(f"{task.devices} strips need as many devices, but there are {len(there)}.")
    return make_mesh(Mesh(1, 1, task.devices), there)


def main(task: Task) -> None:
    if task.side in ("windows", "whole"):
        import jax

        jax.config.update("jax_num_cpu_devices", task.devices)
        facts, work = (windows if task.side == "windows" else whole)(task)
    else:
        from sarjax.bench.torch_scene import sliding_windows

        facts, work = sliding_windows(task)
    # What is resident at most from now on, so that neither compilation nor the first call counts.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    foreign = facts.pop("foreign_bytes", 0)
    before = most_resident() or math.nan
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        stages, start = Stages(), time.perf_counter()
        work(stages)
        seconds, peak = time.perf_counter() - start, most_resident() or math.nan
        memory = {"peak_mb": (peak - foreign) / 1e6, "added_mb": (peak - before) / 1e6}
        print(json.dumps({"seconds": seconds, "stages": stages.seconds, **memory}), flush=True)


if __name__ == "__main__":
    try:
        main(Task(**json.loads(sys.argv[1])))
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
