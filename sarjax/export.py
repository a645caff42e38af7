"""A trained head as one file that jax runs without sarjax: `sarjax export`.

FILE is what `jax.export` serialises: the lowered program with the parameters and the normalisation inside, as a
flatbuffer of StableHLO; nothing is pickled when it is written, and nothing is unpickled when it is read. FILE.json says
what goes in and comes out, how to run it with jax and numpy alone, and which jax wrote it. A jax that is about half a
year newer still reads it (https://docs.jax.dev/en/latest/export/export.html): keep the run to export it again.
"""

import hashlib
import importlib.metadata
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

from sarjax.config import Experiment, Inputs, Mesh
from sarjax.errors import UserError
from sarjax.files import file_digest, write_atomically
from sarjax.methods.record import Head, Tree
from sarjax.models.resampling import LARGEST_SIDE
from sarjax.spec import IGNORE_LABEL, DatasetSpec, ModalitySpec
from sarjax.train.mesh import make_mesh
from sarjax.train.run import Restored, restore_run

FORMAT = "sarjax export 1"
# What is in a run's directory, or may come there: no export is written in its place.
OF_A_RUN = ("config.json", "manifest.json", "spec.json", "stats.json", "metrics.jsonl", "events", "checkpoints", "best",
            "teacher")  # fmt: skip
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLE_SIDE = 256  # of the images in the sidecar's example where the program takes any size


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
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes a head of `run` to `file`, and its description to FILE.json; returns `file`.

    head: "" = the method's first. checkpoint, ema: as `restore_run` has them. size: (height, width) of the images;
    None = any multiples of the network's alignment, up to `LARGEST_SIDE`. batch: images at a time; None = any number.
    platforms: that the program is lowered for; none of them has to be here. overwrite: other files than an export, but
    for those of the run, are replaced too.

    UserError where the run holds no such head or checkpoint, for a size, batch or platform that cannot be, where the
    network cannot be traced for any size, and where `file` cannot or may not be written.
    """
    _require_flatbuffers()
    file, platforms = Path(file), tuple(dict.fromkeys(platforms))
    _check(batch, platforms)
    _check_place(Path(run), file, overwrite)
    # One device: its number is part of the program.
    restored = restore_run(run, make_mesh(Mesh(), jax.local_devices()[:1]), checkpoint=checkpoint, ema=ema, say=say)
    name, chosen = restored.head(head)
    program = export_head(
        chosen,
        restored.params,
        restored.stats,
        restored.spec,
        restored.config.experiment.inputs,
        size=size,
        batch=batch,
        platforms=platforms,
    )
    data = bytes(program.serialize())
    sidecar = _describe(program, restored, chosen, file.name, size, batch) | {
        "head": name,
        "run": Path(run).resolve().name,
        "checkpoint": restored.checkpoint,
        "ema": ema,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomically(file, data)
    # Last: by its digest an older description does not pass for that of a newer file, nor the other way round.
    write_atomically(_sidecar(file), json.dumps(sidecar, indent=1) + "\n")
    say(f"{file}: {len(data) / 1e6:.1f} MB for {', '.join(platforms)}; {_sidecar(file).name} says how to run it")
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
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
) -> jax_export.Exported:
    """The program {name: array} -> {"labels": (b, h, w) uint8, "logits": (b, h, w, k) float32} with `params` inside.

    It takes what `head.requires` names, as a batch holds it: images (b, t, h, w, c) in their stored dtype and
    `<image>_valid` (b, t, h, w) uint8, 0 = no data. A real number that is not finite counts as no data too: what
    reads records has seen to that before, but here nothing has. A label is the class of the largest logit, and 255
    where all images that the head reads are without data, at all dates that `inputs` ask for.

    size, batch, platforms and errors: as for `export_run`.
    """
    _check(batch, platforms)
    alignment = head.context.alignment
    _check_size(size, alignment)
    params, stats = (jax.tree.map(np.asarray, tree) for tree in (params, stats))
    modalities = _modalities(head, spec)
    dates = tuple(range(spec.dates)) if inputs.dates == "all" else tuple(inputs.dates)

    def predict(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        arrays, seen = dict(arrays), []
        for modality in modalities:
            valid = arrays[f"{modality.name}_valid"] > 0
            if modality.dtype == "float32":
                valid &= jnp.isfinite(arrays[modality.name]).all(-1)
            arrays[f"{modality.name}_valid"] = valid.astype(jnp.uint8)
            seen += [valid[:, date] for date in dates]
        logits = head.predict(params, stats, arrays).astype(jnp.float32)
        labels = jnp.where(jnp.stack(seen).any(0), jnp.argmax(logits, -1), IGNORE_LABEL)
        return {"labels": labels.astype(jnp.uint8), "logits": logits}

    sides = size if size is not None else (f"{alignment}*h", f"{alignment}*w")
    limits = [] if size is not None else [f"{side} <= {LARGEST_SIDE // alignment}" for side in "hw"]
    b, h, w = jax_export.symbolic_shape(", ".join(map(str, (batch or "b", *sides))), constraints=limits)
    shapes = {}
    for modality in modalities:
        shape = (b, spec.dates, h, w)
        shapes[modality.name] = jax.ShapeDtypeStruct((*shape, len(modality.bands)), modality.dtype)
        shapes[f"{modality.name}_valid"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    try:
        return jax_export.export(jax.jit(predict), platforms=tuple(platforms))(shapes)
    except jax.errors.InconclusiveDimensionOperation as e:
        raise UserError(
            f"this network cannot be exported for any size ({str(e).splitlines()[0].rstrip('.')}); a fixed size "
            "(--size HxW) and batch (--batch N) would be accepted."
        ) from e


def load(file: Path) -> Artifact:
    """What `export_run` wrote, for programs that have sarjax; FILE.json shows how others run it.

    UserError where FILE or FILE.json is missing or damaged, where they are not of one export, and where this jax does
    not read what that of the export wrote. What this jax cannot compile shows when the program is first called.
    """
    _require_flatbuffers()
    file = Path(file)
    sidecar = _read_sidecar(file)
    try:
        digest = file_digest(file)[1]
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}; a file made by `sarjax export` is accepted.") from e
    if digest != sidecar["sha256"]:
        raise UserError(
            f"{file} is damaged, or of another export than {_sidecar(file).name} (its sha256 is {digest[:12]}..., not "
            f"{sidecar['sha256'][:12]}...); both files as `sarjax export` wrote them are accepted."
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


def _require_flatbuffers() -> None:
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
    ours = _is_export(_sidecar(file))
    for path in (file, _sidecar(file)):
        there, place = path.is_dir() or (os.path.lexists(path) and not ours), folder.resolve() / path.name
        inside = place.relative_to(run.resolve()).parts if place.is_relative_to(run.resolve()) else ()
        if inside and (there or inside[0] in OF_A_RUN):
            raise UserError(f"{path} belongs to the run {run}: a name of its own, or another folder, is accepted.")
        if there and (path.is_dir() or not overwrite):
            raise UserError(f"{path} is there and is no export: another name, or --overwrite for a file, is accepted.")


def _is_export(sidecar: Path) -> bool:
    """Whether `sidecar` describes an export, of this or another version of sarjax."""
    try:
        return json.loads(sidecar.read_text(encoding="utf-8"))["format"].startswith("sarjax export ")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _modalities(head: Head, spec: DatasetSpec) -> tuple[ModalitySpec, ...]:
    """Those that `head` reads, in the data set's order; UserError where it reads anything else."""
    found = tuple(m for m in spec.modalities if m.name in head.requires)
    rest = set(head.requires) - {key for m in found for key in (m.name, f"{m.name}_valid")}
    if rest or not found:
        raise UserError(
            f"this head reads {', '.join(sorted(rest)) or 'nothing'}; a head that reads images and their masks alone "
            "can be exported."
        )
    return found


# ------------------------------------------------------------------------------------------------------------ sidecar


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _read_sidecar(file: Path) -> dict[str, Any]:
    path = _sidecar(file)
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if sidecar["format"] != FORMAT:
            raise ValueError(f"its format is {sidecar['format']!r}, not {FORMAT!r}")
        str(sidecar["sha256"]), str(sidecar["versions"]["jax"]), int(sidecar["calling_convention_version"])
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; the file beside an export is needed.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} describes no export ({e}); the file that `sarjax export` wrote is accepted.") from e
    return sidecar


def _describe(
    program: jax_export.Exported,
    restored: Restored,
    head: Head,
    name: str,
    size: tuple[int, int] | None,
    batch: int | None,
) -> dict[str, Any]:
    """FILE.json, but for what only `export_run` knows."""
    spec, experiment = restored.spec, restored.config.experiment
    modalities = _modalities(head, spec)
    alignment = head.context.alignment
    side = -(-EXAMPLE_SIDE // alignment) * alignment
    leaves = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]
    results = jax.tree.unflatten(program.out_tree, program.out_avals)
    inputs = []
    for modality in modalities:
        mask = f"{modality.name}_valid"
        inputs += [
            {"name": modality.name, **_shape(leaves[modality.name]), **_image(modality, spec, experiment)},
            {
                "name": mask,
                **_shape(leaves[mask]),
                "meaning": f"1 where {modality.name} holds data, else 0; axes batch, date, row, column",
            },
        ]
    return {
        "format": FORMAT,
        "file": name,
        "versions": {package: importlib.metadata.version(package) for package in ("sarjax", "jax", "jaxlib")},
        "calling_convention_version": program.calling_convention_version,
        "platforms": list(program.platforms),
        "inputs": inputs,
        "outputs": [
            {
                "name": "labels",
                **_shape(results["labels"]),
                "meaning": f"class of the largest logit; {IGNORE_LABEL} where no input holds data",
            },
            {
                "name": "logits",
                **_shape(results["logits"]),
                "meaning": "one per class, before softmax; meaningless where no input holds data",
            },
        ],
        "classes": list(spec.class_names),
        "palette": [list(colour) for colour in spec.palette],
        "ignore_label": IGNORE_LABEL,
        "alignment": alignment,
        "largest_side": None if size is not None else LARGEST_SIDE // alignment * alignment,
        "radius": head.context.radius,
        "python": _example(name, modalities, spec.dates, size or (side, side), batch or 1),
        "dataset": spec.name,
        "data_fingerprint": experiment.data.fingerprint,
        "recipe": restored.config.recipe,
        "network": experiment.network.NAME,
        "method": experiment.method.NAME,
        "precision": experiment.precision,
        "step": restored.step,
    }


def _shape(leaf: Any) -> dict[str, Any]:
    return {
        "shape": [str(side) if jax_export.is_symbolic_dim(side) else int(side) for side in leaf.shape],
        "dtype": str(leaf.dtype),
    }


def _image(modality: ModalitySpec, spec: DatasetSpec, experiment: Experiment) -> dict[str, Any]:
    """What an input image holds, and what was done to its files before."""
    by = {
        "dataset": "by mean and standard deviation of the training split",
        "tile": "by mean and standard deviation of each image's own valid pixels, so that a window of a scene differs "
        "from the scene",
    }[experiment.inputs.normalisation]
    return {
        "meaning": f"stored numbers of {modality.name}, not normalised; axes batch, date, row, column, band",
        "dates": spec.dates,
        "bands": [{"name": band.name, "radiometry": band.radiometry} for band in modality.bands],
        "normalisation": f"inside the program, {by}",
        "no_data": modality.no_data,
        "transforms": [
            {"name": t.name, "quantity": t.quantity, "window": t.window, "looks": t.looks} for t in modality.transforms
        ],
    }


def _example(name: str, modalities: Sequence[ModalitySpec], dates: int, size: tuple[int, int], batch: int) -> str:
    """Python that runs the file in its own folder with jax and numpy alone, on empty images."""
    arrays = []
    for modality in modalities:
        shape = (batch, dates, *size)
        arrays += [
            f'    "{modality.name}": np.zeros({(*shape, len(modality.bands))}, np.{modality.dtype}),',
            f'    "{modality.name}_valid": np.ones({shape}, np.uint8),',
        ]
    return "\n".join(
        [
            "# pip install jax flatbuffers numpy",
            "import jax",
            "import jax.export",
            "import numpy as np",
            "",
            f"with open({name!r}, 'rb') as f:",
            "    program = jax.jit(jax.export.deserialize(bytearray(f.read())).call)",
            "",
            "batch = {",
            *arrays,
            "}",
            "result = program(batch)",
            'labels, logits = np.asarray(result["labels"]), np.asarray(result["logits"])',
            "",
        ]
    )
