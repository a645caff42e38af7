"""What makes the maps of a run: its network on windows of a scene, or on the whole scene in strips over devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sarjax.config import Inputs
from sarjax.errors import UserError
from sarjax.scenes.inputs import Reads, Scene
from sarjax.scenes.predict import Apply, Engine, Progress, map_scene
from sarjax.scenes.rasters import Mapped
from sarjax.scenes.windows import Windows, choose, grid
from sarjax.spec import DatasetSpec

if TYPE_CHECKING:
    import jax

    from sarjax.methods.record import Head
    from sarjax.train.run import Restored

PIXELS = 2**20  # per device and batch by default: one large window, or several small ones
TILE = 256  # side of the tiles of runs that did not note it
WHOLE = "whole"  # instead of a window's side, in records of maps

Say = Callable[[str], None]
Make = Callable[[Scene, tuple[int, int], Path, Path | None, Mapping[str, str], Progress | None], Mapped]


class Maker(NamedTuple):
    """What makes maps.

    about: the settings that a map depends on. make: (scene, its size, labels, probabilities or None, tags, progress),
    as `sarjax.scenes.predict.map_scene`. notes: of the record, what a map does not depend on.
    """

    reads: Reads
    about: dict[str, Any]
    make: Make
    notes: dict[str, Any]


def by_windows(
    restored: "Restored", name: str, mesh: "jax.sharding.Mesh", windows: Windows, *, batch: int, tta: bool
) -> Maker:
    """Maps by head `name` from windows, `batch` on each device at a time; 0 = by their size."""
    from sarjax.train.mesh import row_shards

    if batch < 0:
        raise UserError(f"--batch is {batch}, but should be a whole number from 1, or 0 to leave it open.")
    head, inputs = restored.method.heads[name], restored.config.experiment.inputs
    apply, classify = on_devices(head.predict, (restored.params, restored.stats), mesh, tta)
    engine = Engine(
        apply,
        reads_of(name, head, inputs, restored.spec),
        head.context,
        windows,
        batch or max(1, PIXELS // windows.side**2),
        inputs.normalisation == "tile",
        classify,
    )

    def make(scene, size, labels, probabilities, tags, progress) -> Mapped:
        rows = batch_rows(engine, size, row_shards(mesh))
        return map_scene(engine._replace(rows=rows), scene, labels, probabilities, tags=tags, progress=progress)

    about = {"window": windows.side, "overlap": windows.overlap, "tta": tta}
    return Maker(engine.reads, about, make, {})


def in_strips(
    run: Path, restored: "Restored", name: str, mesh: "jax.sharding.Mesh", *, allow_global: bool, say: Say
) -> Maker:
    """Maps by head `name` of whole scenes, a strip on each device of `mesh`; UserError for a network that is global."""
    from sarjax.scenes.whole import Whole, map_whole

    head, inputs = restored.method.heads[name], restored.config.experiment.inputs
    if head.context.radius is None and not allow_global:
        side = trained_side(run, restored)
        raise UserError(
            f"head {name!r} of {run} takes means of its whole image, and learnt them on tiles of {side} pixels: of a "
            "whole scene they say something else, and every pixel would depend on all others; windows, without "
            "--mesh.space, are accepted, and --allow-global maps the scene at once nevertheless."
        )
    whole = Whole(
        head.predict,
        (restored.params, restored.stats),
        reads_of(name, head, inputs, restored.spec),
        head.context,
        mesh,
        by_scene=inputs.normalisation == "tile",
        window=choose(head.context, trained_side(run, restored)).side,
    )

    def make(scene, size, labels, probabilities, tags, progress) -> Mapped:
        return map_whole(whole, scene, labels, probabilities, tags=tags, progress=progress, say=say)

    return Maker(whole.reads, {"window": WHOLE, "overlap": 0, "tta": False}, make, {"strips": mesh.size})


def trained_side(run: Path, restored: "Restored") -> int:
    """The side of the tiles that the run was trained on."""
    from sarjax.train.run import read_manifest

    return restored.config.experiment.augment.crop or min(read_manifest(run).get("tile") or [TILE])


def choose_windows(run: Path, restored: "Restored", head: str, side: int, overlap: int | None, say: Say) -> Windows:
    """The windows that were asked for, else those that fit the head and the tiles that the run was trained on."""
    context = restored.method.heads[head].context
    windows = choose(context, trained_side(run, restored), side, overlap)
    if context.radius is not None and windows.overlap < context.radius:
        enough = -(-context.radius // context.alignment) * context.alignment
        fits = overlap is not None and 2 * enough < windows.side
        better = f"--overlap {enough}" if fits else f"--window {4 * enough} without --overlap"
        say(
            f"windows of {windows.side} pixels overlap by {windows.overlap}, less than the {context.radius} that this "
            f"network looks: seams may show, which {better} would avoid"
        )
    return windows


def reads_of(name: str, head: "Head", inputs: Inputs, spec: DatasetSpec) -> Reads:
    """What head `name` reads of scenes: sensors by its `requires`, dates by the run's inputs; UserError for more."""
    modalities = tuple(m for m in spec.modality_names if m in head.requires)
    odd = sorted(set(head.requires) - {key for m in modalities for key in (m, f"{m}_valid")})
    if odd or not modalities:
        raise UserError(f"head {name!r} reads {', '.join(odd) or 'no image'}, which no scene has; another would do.")
    dates = range(spec.dates) if inputs.dates == "all" else sorted(set(inputs.dates))
    return Reads(spec, modalities, tuple(dates))


def on_devices(
    predict: Callable[[Any, Any, Mapping[str, Any]], Any],
    variables: tuple[Any, Any],
    mesh: "jax.sharding.Mesh",
    tta: bool = False,
) -> tuple[Apply, Apply]:
    """(batch of numpy arrays) -> probabilities, and -> classes, rows over the mesh; compiled once for each shape.

    predict: (params, stats, batch) -> logits (b, h, w, k). variables: params and stats, on the mesh.
    """
    import jax
    import jax.numpy as jnp

    from sarjax.scenes.classes import most_probable
    from sarjax.scenes.symmetry import over_symmetries
    from sarjax.train.mesh import batch_sharding, put_batch

    def probabilities(params: Any, stats: Any, batch: Any) -> Any:
        def once(rows: Any) -> Any:
            return jax.nn.softmax(predict(params, stats, rows).astype(jnp.float32), -1)

        return (over_symmetries(once) if tta else once)(batch)

    def classes(params: Any, stats: Any, batch: Any) -> Any:
        scores = (probabilities if tta else predict)(params, stats, batch)
        return most_probable(scores)

    def compiled(function: Callable[..., Any]) -> Apply:
        step = jax.jit(function, out_shardings=batch_sharding(mesh, 1))
        return lambda batch: step(*variables, put_batch(mesh, batch))

    return compiled(probabilities), compiled(classes)


def batch_rows(engine: Engine, size: tuple[int, int], shards: int) -> int:
    """Windows in a batch: as many as asked for on every device, but not more than the scene has."""
    rows, columns = grid(*size, engine.windows, engine.context, shards)
    count = len(rows.origins) * len(columns.origins)
    return shards * min(engine.rows, -(-count // shards))
