"""What a trained run costs where it is deployed, beside its teacher: `sarjax bench deploy`.

What is measured is what is deployed: an export of one tile (see `sarjax.export`), read and called by a process that has
jax and numpy alone. Stored bands go in from host memory and class labels come out to host memory.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sarjax.augment.inputs import channel_count
from sarjax.bench.timing import check, machine
from sarjax.bench.worker import PROGRESS
from sarjax.config import Mesh
from sarjax.errors import UserError
from sarjax.export import DEFAULT_PLATFORMS, export_head, held_weights, image_shapes, require_flatbuffers
from sarjax.files import write_atomically
from sarjax.methods.record import Head
from sarjax.models.cost import count_flops
from sarjax.models.resampling import LARGEST_SIDE
from sarjax.reports.run import results_folder
from sarjax.train import teacher as teachers
from sarjax.train.mesh import make_mesh
from sarjax.train.run import PRECISIONS, Restored, read_manifest, restore_run

FORMAT = "sarjax bench deploy 1"
FILE = "deploy.json"  # in RUN/bench
REPETITIONS = 50
TILE = 256  # side of the tiles of runs that did not note it
WORKER = Path(__file__).with_name("worker.py")
MEASURED = (
    "a call of the exported program at batch 1: stored bands in host memory in, class labels in host memory out, "
    "normalisation inside; programs take turns in one process"
)

Say = Callable[[str], None]


class Candidate(NamedTuple):
    """A head that could be deployed. role: "run", "teacher" (the copy in the run) or "against" (another run)."""

    role: str
    restored: Restored
    name: str

    @property
    def head(self) -> Head:
        return self.restored.method.heads[self.name]


def bench_deploy(
    run: Path,
    *,
    against: Path | None = None,
    size: int = 0,
    head: str = "",
    checkpoint: str = "best",
    repetitions: int = REPETITIONS,
    say: Say = print,
) -> dict[str, Any]:
    """Measures a run, and its teacher or another run, as they would be deployed; writes RUN/bench/deploy.json.

    Parameters, operations, size of the exported file, memory and latency, in float32 and bfloat16, with one thread and
    with all cores; docs/data.md says what each figure means.

    Args:
      run: the run's directory.
      against: another run's; None = the teacher that `run` keeps, where it has one.
      size: side of the tile in pixels; 0 = that of the run's training tiles.
      head: of the method; "" = its first. The other network is asked for the same, or else for its first.
      checkpoint: of `run` and of `against`, see `restore_run`.
      repetitions: timed calls of each program.

    Returns:
      What the file holds.

    Raises:
      UserError: no such run, checkpoint or head, a size or number of repetitions that cannot be, a folder that cannot
        be written to, or a measuring process that fails. Nothing is written then.
    """
    check(repetitions)
    require_flatbuffers()
    run = Path(run)
    candidates = _candidates(run, against, head, checkpoint, say)
    side = _side(run, candidates, size)
    folder = results_folder(run, "bench")
    try:
        networks, measured_on = _measure(candidates, side, repetitions, say)
        result = {
            "format": FORMAT,
            "run": str(run.resolve()),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "size": side,
            "batch": 1,
            "repetitions": repetitions,
            "measured": MEASURED,
            **measured_on,
            "networks": networks,
        }
        write_atomically(folder / FILE, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
        raise
    return result


# --- What is measured


def _candidates(run: Path, against: Path | None, head: str, checkpoint: str, say: Say) -> list[Candidate]:
    mesh = make_mesh(Mesh(), jax.local_devices()[:1])
    found = [("run", restore_run(run, mesh, checkpoint=checkpoint, say=say))]
    if against is not None:
        found.append(("against", restore_run(Path(against), mesh, checkpoint=checkpoint, say=say)))
    elif (run / "teacher").is_dir():
        found.append(("teacher", teachers.restore(run, mesh)))
    name, _ = found[0][1].head(head)
    heads = [name if role == "run" or name in r.method.heads else next(iter(r.method.heads)) for role, r in found]
    return [Candidate(role, _deployed(restored), head) for (role, restored), head in zip(found, heads, strict=True)]


def _deployed(restored: Restored) -> Restored:
    """Without the parameters and statistics that the method has beside its network, which no head reads."""
    params, stats = (
        {name: part for name, part in tree.items() if name not in restored.method.beside}
        for tree in (restored.params, restored.stats)
    )
    return restored._replace(params=params, stats=stats)


def _side(run: Path, candidates: Sequence[Candidate], size: int) -> int:
    """The tile's side: as asked, else the run's training tiles', rounded to what every network takes."""
    step = math.lcm(*(c.head.context.alignment for c in candidates))
    trained = candidates[0].restored.config.experiment.augment.crop or min(read_manifest(run).get("tile") or [TILE])
    nearest = [max(1, (size or trained) // step) * step, max(1, -(-(size or trained) // step)) * step]
    if not size:
        return min(nearest, key=lambda side: abs(side - trained))
    if size > LARGEST_SIDE:
        raise UserError(f"size is {size}; a side of at most {LARGEST_SIDE} pixels is accepted.")
    if size != nearest[0]:
        what = "this network takes" if len(candidates) == 1 else "these networks take"
        accepted = " or ".join(dict.fromkeys(map(str, nearest)))
        raise UserError(f"size is {size}, but {what} multiples of {step} pixels; {accepted} would be accepted.")
    return size


def _measure(
    candidates: Sequence[Candidate], side: int, repetitions: int, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what is known of each network, what it was measured on)."""
    with tempfile.TemporaryDirectory(prefix="sarjax-bench-") as folder:
        networks, programs = [], {}
        for c in candidates:
            networks.append(_describe(c, side))
            for precision in PRECISIONS:
                file = Path(folder) / f"{c.role}-{precision}"
                networks[-1]["precisions"][precision] = programs[str(file)] = _export(c, precision, side, file)
                size = programs[str(file)]["artifact_bytes"]
                say(f"{c.role}, {precision}: exported for {side} x {side} pixels, {size / 1e6:.2f} MB")
        _share(networks)

        for file, facts in programs.items():
            alone = _work(0, 1, [file], f"memory of {Path(file).name}", say)
            facts["rss_start_bytes"], facts["rss_peak_bytes"] = alone["rss_start_bytes"], alone["rss_peak_bytes"]
        threads, measured_on = [0], {}
        while threads:
            cores = threads.pop()
            found = _work(cores, repetitions, list(programs), "one thread" if cores else "all that is there", say)
            cpu = found["platform"] == "cpu"
            if not measured_on:
                measured_on = _machine(found)
                if cpu and found["cores"] > 1 and hasattr(os, "sched_setaffinity"):
                    threads.append(1)
            for program in found["programs"]:
                _add(programs[program["file"]], program, found["cores"] if cpu else None)
    return networks, measured_on


def _describe(c: Candidate, side: int) -> dict[str, Any]:
    """What is known without measuring: which network it is, its parameters and its operations."""
    experiment, spec = c.restored.config.experiment, c.restored.spec
    shapes = image_shapes(c.head, spec, (side, side), 1)
    return {
        "role": c.role,
        "run": str(c.restored.workdir.resolve()),
        "recipe": c.restored.config.recipe,
        "checkpoint": c.restored.checkpoint,
        "network": experiment.network.NAME,
        "encoder": experiment.network.encoder,
        "width": experiment.network.width,
        "head": c.name,
        "sensors": list(experiment.inputs.modalities),
        "channels": channel_count(experiment.inputs, spec),
        "trained_precision": experiment.precision,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(c.restored.params)),
        "flops": count_flops(c.head.predict, c.restored.params, c.restored.stats, shapes),
        "precisions": {},
    }


def _export(c: Candidate, precision: str, side: int, file: Path) -> dict[str, Any]:
    """Writes the program for one tile to `file`; sizes of it and of the weights that it holds."""
    restored = c.restored.at_precision(precision)
    head, spec, inputs = restored.method.heads[c.name], restored.spec, restored.config.experiment.inputs
    fixed: dict[str, Any] = {"size": (side, side), "batch": 1}
    program = export_head(
        head, restored.params, restored.stats, spec, inputs, **fixed, logits=False, platforms=DEFAULT_PLATFORMS
    )
    file.write_bytes(program.serialize())
    weights = held_weights(head, restored.params, restored.stats, image_shapes(head, spec, **fixed))
    size, held = file.stat().st_size, sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    # What another head alone reads is left out of the file.
    return {"artifact_bytes": size, "weights_bytes": min(held, size), "latency": []}


def _share(networks: list[dict[str, Any]]) -> None:
    """Notes the first network's operations as a share of the second's."""
    if len(networks) > 1 and networks[1]["flops"]:
        networks[0]["flops_share"] = networks[0]["flops"] / networks[1]["flops"]


def _add(facts: dict[str, Any], program: dict[str, Any], threads: int | None) -> None:
    """Adds what a process measured; threads: None on an accelerator, where they do not count."""
    for key in ("xla_flops", "arguments_bytes", "outputs_bytes", "temporaries_bytes"):
        facts.setdefault(key, program[key])
    # The weights are constants of the program, which XLA's figures leave out.
    parts = ("arguments_bytes", "outputs_bytes", "temporaries_bytes", "weights_bytes")
    facts["xla_peak_bytes"] = sum(facts[part] for part in parts)
    facts["latency"].append({"threads": threads, **{key: program[key] for key in ("n", "p50_ms", "p99_ms")}})


def _machine(found: dict[str, Any]) -> dict[str, Any]:
    return {"platform": found["platform"], "device": found["device"], **machine(), "cores": found["cores"]}


# --- The process that measures


def _work(cores: int, rounds: int, files: Sequence[str], what: str, say: Say) -> dict[str, Any]:
    """What `worker.py` prints; UserError, with the last line that it said, where it fails."""
    say(f"measuring: {what}")
    command = [sys.executable, "-P", str(WORKER), str(cores), str(rounds), *files]
    # What was compiled before must not be found: that it is compiled is a part of the memory that a process needs.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    last = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        try:
            for line in filter(None, map(str.strip, process.stderr)):
                if line.startswith(PROGRESS):
                    say(f"  {line.removeprefix(PROGRESS)}")
                else:
                    last = line
            printed = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    try:
        if process.returncode:
            raise ValueError
        return json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError) as e:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise UserError(
            f"the process that measures ({what}) ended with {how}: {last.rstrip('.') or 'it said nothing'}; a smaller "
            "--size, or a machine with more memory, may do."
        ) from e
