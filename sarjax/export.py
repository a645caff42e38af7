"""A trained head as one file that jax runs without sarjax: `sarjax export`.

FILE is what `jax.export` serialises: the lowered program with the parameters and the normalisation inside, as a
flatbuffer of StableHLO; nothing is pickled when it is written, and nothing is unpickled when it is read. FILE.json says
what goes in and comes out, how to run it with jax and numpy alone, and which jax wrote it. A jax that is about half a
year newer still reads it (https://docs.jax.dev/en/latest/export/export.html): keep the run to export it again.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.core import Literal

from sarjax.config import Inputs, Mesh
from sarjax.errors import UserError
from sarjax.files import file_digest, write_atomically
from sarjax.methods.record import Head, Tree
from sarjax.models.resampling import LARGEST_SIDE
from sarjax.sidecar import describe, is_export, modalities_of, read_sidecar, sidecar_of
from sarjax.spec import IGNORE_LABEL, DatasetSpec
from sarjax.train.mesh import make_mesh
from sarjax.train.run import restore_run

# What is in a run's directory, or may come there: no export is written in its place.
OF_A_RUN = ("config.json", "manifest.json", "spec.json", "stats.json", "metrics.jsonl", "events", "checkpoints", "best",
            "teacher", "lock", "bench")  # fmt: skip
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")


class Artifact(NamedTuple):
    """What an export holds: `program.call({name: array})` gives {"labels", "logits"}; `sidecar` is FILE.json."""

    program: jax_export.Exported
    sidecar: dict[str, Any]


def export_run(
    run: Path,
    file: Path,
    *,
    head: str = "",
    checkpoint: str = "best",
    ema: bool = False,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: str = "",
    logits: bool = True,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes a head of `run` to `file`, and its description to FILE.json; returns `file`.

    head: "" = the method's first. checkpoint, ema: as `restore_run` has them. size: (height, width) of the images;
    None = any multiples of the network's alignment, up to `LARGEST_SIDE`. batch: images at a time; None = any number.
    precision: compute dtype of the network; "" = as it was trained. logits: whether they come out beside the labels.
    platforms: that the program is lowered for; none of them has to be here. overwrite: other files than an export, but
    for those of the run, are replaced too.

    UserError where the run holds no such head or checkpoint, for a size, batch or platform that cannot be, where the
    network cannot be traced for any size, and where `file` cannot or may not be written.
    """
    require_flatbuffers()
    file, platforms = Path(file), tuple(dict.fromkeys(platforms))
    _check(batch, platforms)
    _check_place(Path(run), file, overwrite)
    # One device: its number is part of the program.
    restored = restore_run(run, make_mesh(Mesh(), jax.local_devices()[:1]), checkpoint=checkpoint, ema=ema, say=say)
    restored = restored.at_precision(precision) if precision else restored
    name, chosen = restored.head(head)
    program = export_head(
        chosen,
        restored.params,
        restored.stats,
        restored.spec,
        restored.config.experiment.inputs,
        size=size,
        batch=batch,
        logits=logits,
        platforms=platforms,
    )
    data = bytes(program.serialize())
    sidecar = describe(program, restored, chosen, file.name, size, batch) | {
        "head": name,
        "run": Path(run).resolve().name,
        "checkpoint": restored.checkpoint,
        "ema": ema,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomically(file, data)
    # Last: by its digest an older description does not pass for that of a newer file, nor the other way round.
    write_atomically(sidecar_of(file), json.dumps(sidecar, indent=1) + "\n")
    say(f"{file}: {len(data) / 1e6:.1f} MB for {', '.join(platforms)}; {sidecar_of(file).name} says how to run it")
    return file


def export_head(
    head: Head,
    params: Tree,
    stats: Tree,
    spec: DatasetSpec,
    inputs: Inputs,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    logits: bool = True,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
) -> jax_export.Exported:
    """The program {name: array} -> {"labels": (b, h, w) uint8, "logits": (b, h, w, k) float32} with `params` inside.

    It takes what `head.requires` names, as a batch holds it: images (b, t, h, w, c) in their stored dtype and
    `<image>_valid` (b, t, h, w) uint8, 0 = no data. A real number that is not finite counts as no data too: what
    reads records has seen to that before, but here nothing has. A label is the class of the largest logit, and 255
    where all images that the head reads are without data, at all dates that `inputs` ask for.

    size, batch, logits, platforms and errors: as for `export_run`.
    """
    _check(batch, platforms)
    alignment = head.context.alignment
    _check_size(size, alignment)
    modalities = modalities_of(head, spec)
    dates = tuple(range(spec.dates)) if inputs.dates == "all" else tuple(inputs.dates)

    def predict(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        arrays, seen = dict(arrays), []
        for modality in modalities:
            valid = arrays[f"{modality.name}_valid"] > 0
            if modality.dtype == "float32":
                valid &= jnp.isfinite(arrays[modality.name]).all(-1)
            arrays[f"{modality.name}_valid"] = valid.astype(jnp.uint8)
            seen += [valid[:, date] for date in dates]
        scores = head.predict(*weights, arrays).astype(jnp.float32)
        labels = jnp.where(jnp.stack(seen).any(0), jnp.argmax(scores, -1), IGNORE_LABEL)
        return {"labels": labels.astype(jnp.uint8)} | ({"logits": scores} if logits else {})

    shapes = image_shapes(head, spec, size, batch)
    try:
        weights = held_weights(head, params, stats, shapes)
        return jax_export.export(jax.jit(predict), platforms=tuple(platforms))(shapes)
    except jax.errors.InconclusiveDimensionOperation as e:
        raise UserError(
            f"this network cannot be exported for any size ({str(e).splitlines()[0].rstrip('.')}); a fixed size "
            "(--size HxW) and batch (--batch N) would be accepted."
        ) from e


def image_shapes(
    head: Head, spec: DatasetSpec, size: tuple[int, int] | None = None, batch: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `head` reads, by name, as a batch holds it; sides and rows that are not given are symbols."""
    alignment = head.context.alignment
    sides = size if size is not None else (f"{alignment}*h", f"{alignment}*w")
    limits = [] if size is not None else [f"{side} <= {LARGEST_SIDE // alignment}" for side in "hw"]
    b, h, w = jax_export.symbolic_shape(", ".join(map(str, (batch or "b", *sides))), constraints=limits)
    shapes = {}
    for modality in modalities_of(head, spec):
        shape = (b, spec.dates, h, w)
        shapes[modality.name] = jax.ShapeDtypeStruct((*shape, len(modality.bands)), modality.dtype)
        shapes[f"{modality.name}_valid"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return shapes


def held_weights(
    head: Head, params: Tree, stats: Tree, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Tree, Tree]:
    """`params` and `stats` as a program for images of `shapes` needs to hold them, as numpy arrays.

    A leaf that the head does nothing with but to round it to one narrower dtype is held in that one: half the bytes of
    a bfloat16 network's kernels, and the same results to the bit.
    """
    weights = jax.tree.map(np.asarray, (params, stats))
    leaves, tree = jax.tree.flatten(weights)
    program = jax.make_jaxpr(head.predict)(*weights, shapes).jaxpr
    uses: dict[Any, set[Any]] = {variable: set() for variable in program.invars[: len(leaves)]}
    for equation in program.eqns:
        rounds = equation.primitive.name == "convert_element_type"
        for variable in equation.invars:
            if not isinstance(variable, Literal) and variable in uses:
                uses[variable].add(equation.params["new_dtype"] if rounds else None)

    def held(leaf: np.ndarray, to: set[Any]) -> np.ndarray:
        (dtype,) = to if len(to) == 1 else (None,)
        return leaf if dtype is None or np.dtype(dtype).itemsize >= leaf.itemsize else leaf.astype(dtype)

    return jax.tree.unflatten(tree, [held(leaf, to) for leaf, to in zip(leaves, uses.values(), strict=True)])


def load(file: Path) -> Artifact:
    """What `export_run` wrote, for programs that have sarjax; FILE.json shows how others run it.

    UserError where FILE or FILE.json is missing or damaged, where they are not of one export, and where this jax does
    not read what that of the export wrote. What this jax cannot compile shows when the program is first called.
    """
    require_flatbuffers()
    file = Path(file)
    sidecar = read_sidecar(file)
    try:
        digest = file_digest(file)[1]
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}; a file made by `sarjax export` is accepted.") from e
    if digest != sidecar["sha256"]:
        raise UserError(
            f"{file} is damaged, or of another export than {sidecar_of(file).name} (its sha256 is {digest[:12]}..., "
            f"not {sidecar['sha256'][:12]}...); both files as `sarjax export` wrote them are accepted."
        )
    lowest = jax_export.minimum_supported_calling_convention_version
    highest = jax_export.maximum_supported_calling_convention_version
    refused = (
        f"{file} was written by jax {sidecar['versions']['jax']} (calling convention "
        f"{sidecar['calling_convention_version']}), which jax {jax.__version__} does not read (it reads {lowest} to "
        f"{highest}); export the run again, or use the jax that wrote it."
    )
    if not lowest <= sidecar["calling_convention_version"] <= highest:
        raise UserError(refused)
    try:
        return Artifact(jax_export.deserialize(bytearray(data)), sidecar)
    except Exception as e:  # the bytes are as written: whatever is raised here is this jax's refusal
        raise UserError(refused) from e


# ------------------------------------------------------------------------------------------------------------- checks


def require_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("exports need the package flatbuffers, which is not installed: pip install 'sarjax[export]'.")


def _check(batch: int | None, platforms: Sequence[str]) -> None:
    known = f"{', '.join(PLATFORMS[:-1])} and {PLATFORMS[-1]}"
    if batch is not None and batch < 1:
        raise UserError(f"batch is {batch}; a number of images from 1, or none for any number, would be accepted.")
    if not platforms:
        raise UserError(f"no platform to export for; one or more of {known} would be accepted.")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"platform is {platform!r}; {known} are accepted.")


def _check_size(size: tuple[int, int] | None, alignment: int) -> None:
    """UserError for a height or width that is no multiple of `alignment`, with the nearest that are."""
    if size is None or all(side > 0 and side % alignment == 0 for side in size):
        return
    below = tuple(max(1, side // alignment) * alignment for side in size)
    above = tuple(max(1, -(-side // alignment)) * alignment for side in size)
    nearest = " or ".join(dict.fromkeys(f"{height}x{width}" for height, width in (below, above)))
    raise UserError(
        f"size is {size[0]}x{size[1]}, but this network takes multiples of {alignment} pixels; {nearest} would be "
        "accepted."
    )


def _check_place(run: Path, file: Path, overwrite: bool) -> None:
    """UserError where `file` or its sidecar cannot be written, or would replace what is no export."""
    folder = file.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write {file}: {folder} is no folder that may be written to, which is needed.")
    ours = is_export(sidecar_of(file))
    for path in (file, sidecar_of(file)):
        there, place = path.is_dir() or (os.path.lexists(path) and not ours), folder.resolve() / path.name
        inside = place.relative_to(run.resolve()).parts if place.is_relative_to(run.resolve()) else ()
        if inside and (there or inside[0] in OF_A_RUN):
            raise UserError(f"{path} belongs to the run {run}: a name of its own, or another folder, is accepted.")
        if there and (path.is_dir() or not overwrite):
            raise UserError(f"{path} is there and is no export: another name, or --overwrite for a file, is accepted.")
