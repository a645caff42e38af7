"""FILE.json beside an export: what goes in and comes out, which versions made it, and how to run it without sarjax."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export as jax_export

from sarjax.config import Experiment
from sarjax.errors import UserError
from sarjax.methods.record import Head
from sarjax.models.resampling import LARGEST_SIDE
from sarjax.spec import IGNORE_LABEL, DatasetSpec, ModalitySpec
from sarjax.train.run import Restored

FORMAT = "sarjax export 1"
EXAMPLE_SIDE = 256  # of the images in the sidecar's example where the program takes any size
OUTPUTS = {
    "labels": f"class of the largest logit; {IGNORE_LABEL} where no input holds data",
    "logits": "one per class, before softmax; meaningless where no input holds data",
}


def sidecar_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def is_export(sidecar: Path) -> bool:
    """Whether `sidecar` describes an export, of this or another version of sarjax."""
    try:
        return json.loads(sidecar.read_text(encoding="utf-8"))["format"].startswith("sarjax export ")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_sidecar(file: Path) -> dict[str, Any]:
    """What FILE.json holds; UserError where it is missing or describes no export of this version."""
    path = sidecar_of(file)
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


def modalities_of(head: Head, spec: DatasetSpec) -> tuple[ModalitySpec, ...]:
    """Those that `head` reads, in the data set's order; UserError where it reads anything else."""
    found = tuple(m for m in spec.modalities if m.name in head.requires)
    rest = set(head.requires) - {key for m in found for key in (m.name, f"{m.name}_valid")}
    if rest or not found:
        raise UserError(
            f"this head reads {', '.join(sorted(rest)) or 'nothing'}; a head that reads images and their masks alone "
            "can be exported."
        )
    return found


def describe(
    program: jax_export.Exported,
    restored: Restored,
    head: Head,
    name: str,
    size: tuple[int, int] | None,
    batch: int | None,
) -> dict[str, Any]:
    """FILE.json, but for what only `export_run` knows."""
    spec, experiment = restored.spec, restored.config.experiment
    modalities = modalities_of(head, spec)
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
        "outputs": [{"name": out, **_shape(leaf), "meaning": OUTPUTS[out]} for out, leaf in results.items()],
        "classes": list(spec.class_names),
        "palette": [list(colour) for colour in spec.palette],
        "ignore_label": IGNORE_LABEL,
        "alignment": alignment,
        "largest_side": None if size is not None else LARGEST_SIDE // alignment * alignment,
        "radius": head.context.radius,
        "python": _example(name, modalities, tuple(results), spec.dates, size or (side, side), batch or 1),
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


def _example(
    name: str,
    modalities: Sequence[ModalitySpec],
    results: Sequence[str],
    dates: int,
    size: tuple[int, int],
    batch: int,
) -> str:
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
            *(f'{out} = np.asarray(result["{out}"])' for out in results),
            "",
        ]
    )
