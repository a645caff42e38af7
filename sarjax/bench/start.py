"""How long it takes until something happens: `sarjax --help`, and a run's first step: `sarjax bench start`.

Everything runs in a new process, and is timed from before it is started. Files are in the system's cache.
"""

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarjax.bench import timing
from sarjax.errors import UserError

SCENES, SIZE = 3, (512, 512)
COMMANDS: dict[str, tuple[str, ...]] = {
    "python": ("-c", "pass"),
    "import sarjax": ("-c", "import sarjax"),
    "sarjax --version": ("-m", "sarjax", "--version"),
    "sarjax --help": ("-m", "sarjax", "--help"),
    "sarjax train --help": ("-m", "sarjax", "train", "--help"),
    "import jax": ("-c", "import jax"),
    "import torch": ("-c", "import torch"),
}
# What of `sarjax.train.loop` is a part of a start; tracing and compiling the step are told apart by themselves.
PARTS = {
    "data": ("open_dataset", "make_method", "make_batches"),
    "first_state": ("abstract_state", "born"),
}
PHASES = ("imports", *PARTS, "trace", "compile", "first_step")

Say = Callable[[str], None]


def bench_start(
    recipe: str = "synthetic_sar",
    *,
    preset: str = "",
    batch: int = 8,
    repetitions: int = timing.REPETITIONS,
    torch: bool = True,
    say: Say = print,
) -> dict[str, Any]:
    """Seconds of the command line's cheapest answers, and to the first step of a run, cold and warm, in turn.

    Cold: the persistent compilation cache is an empty folder. Warm: it holds what an earlier run left. For PyTorch, the
    same network's first step on noise, not compiled, without data, command line, checkpoints or run directory.

    Args:
      recipe, preset: what is trained, on made-up scenes; a recipe of whu_opt_sar that learns without a teacher.
      batch: tiles of a step.
      repetitions: of each, after one that does not count.
      torch: PyTorch too, where it is installed.

    Raises:
      UserError: a recipe on other data, a run that fails.
    """
    timing.check(repetitions)
    experiment = _experiment(recipe, preset)
    installed = importlib.util.find_spec("torch") is not None
    if torch and not installed:
        say("torch is not installed (pip install 'sarjax[bench]'): its figures are left out")
    with tempfile.TemporaryDirectory(prefix="sarjax-bench-") as folder:
        root = Path(folder)
        say(f"making {SCENES} scenes and their records")
        records = _records(root, experiment)
        arguments = [recipe, *(["--preset", preset] if preset else []), "--data-dir", str(records)]
        arguments += ["--batch-size", str(batch), "--steps", "2", "--log-every", "1"]
        phases: dict[str, list[dict[str, float]]] = {"train, cold": [], "train, warm": [], "torch, first step": []}

        def train(name: str) -> float:
            with tempfile.TemporaryDirectory(dir=root) as place:
                cache = root / "warm" if name == "train, warm" else Path(place) / "cold"
                found = _first([*arguments, "--workdir", f"{place}/run"], JAX_COMPILATION_CACHE_DIR=str(cache))
            phases[name].append(found)
            return found["seconds"]

        def peer() -> float:
            phases["torch, first step"].append(_first(["torch", recipe, preset, str(batch)]))
            return phases["torch, first step"][-1]["seconds"]

        wanted = [name for name in COMMANDS if name != "import torch" or (torch and installed)]
        sides = {name: lambda name=name: _seconds([sys.executable, *COMMANDS[name]]) for name in wanted}
        sides |= {name: lambda name=name: train(name) for name in ("train, cold", "train, warm")}
        if torch and installed:
            sides["torch, first step"] = peer
        say(f"timing {len(sides)} starts, {repetitions} of each, in turn")
        found = timing.in_turns(sides, repetitions, clock=lambda side: side())
    rows = [{"side": name, "seconds": spread, **_median(phases.get(name, ()))} for name, spread in found.items()]
    if torch and not installed:
        rows += [{"side": name, "seconds": None} for name in ("import torch", "torch, first step")]
    return {
        "benchmark": "start",
        **timing.machine("flax", "optax", "orbax-checkpoint", "tyro", *(["torch"] if torch else [])),
        "recipe": f"{recipe}+{preset}" if preset else recipe,
        "network": f"{experiment.network.NAME} {experiment.network.encoder} x{experiment.network.width:g}",
        "method": experiment.method.NAME,
        "batch": batch,
        "rows": rows,
    }


def _median(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each phase; the first run does not count."""
    return {
        f"{phase}_seconds": statistics.median(one[phase] for one in found[1:])
        for phase in (*PHASES, "other")
        if found and phase in found[0]
    }


def _experiment(recipe: str, preset: str) -> Any:
    from sarjax import recipes

    experiment = recipes.find(recipe, preset).experiment
    if experiment.data.name != "whu_opt_sar":
        raise UserError(
            f"recipe {recipe!r} learns from {experiment.data.name}, of which no scenes can be made up; one that learns "
            "from whu_opt_sar is accepted."
        )
    return experiment


def _records(root: Path, experiment: Any) -> Path:
    from sarjax.data.build import build
    from sarjax.data.synthesis import synthesize

    source = synthesize(root / "scenes", SCENES, SIZE)
    build("whu_opt_sar", source, root / "records", experiment.data.config)
    return root / "records"


# --- New processes


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    _run(command, os.environ)
    return time.perf_counter() - start


def _first(arguments: Sequence[str], **variables: str) -> dict[str, float]:
    """What `first_step` says in a process of its own."""
    code = "from sarjax.bench.start import first_step; first_step()"
    command = [sys.executable, "-c", code, repr(time.time()), *arguments]
    return json.loads(_run(command, os.environ | variables).splitlines()[-1])


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{' '.join(command[1:])} ended with exit code {done.returncode}: {last}")
    return done.stdout


def first_step() -> None:
    """In a process of its own: trains up to the first step's metrics, prints what took how long, and is gone."""
    started, *arguments = sys.argv[1:]
    began = float(started)
    (_first_of_torch if arguments[0] == "torch" else _first_of_ours)(began, arguments)


def _leave(phases: dict[str, float], seconds: float) -> None:
    print(json.dumps(phases | {"other": seconds - sum(phases.values()), "seconds": seconds}), flush=True)
    os._exit(0)  # what follows, evaluation and checkpoints, belongs to no start


def _first_of_ours(began: float, arguments: Sequence[str]) -> None:
    from sarjax.train import loop

    cli = importlib.import_module("sarjax.cli")  # by name: it is the command line that is measured, as a user starts it

    phases = dict.fromkeys(PHASES, 0.0) | {"imports": time.time() - began}
    compiled_at = 0.0

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled_at
            start = time.time()
            found = function(*args, **kwargs)
            compiled_at = time.time()
            phases[phase] += compiled_at - start
            return found

        return call

    class Lowered:
        def __init__(self, lowered: Any):
            self.compile = timed("compile", lowered.compile)

    class Jitted:
        def __init__(self, jitted: Any):
            self.lower = timed("trace", lambda *shapes: Lowered(jitted.lower(*shapes)))

    def written(terminal: Any, step: int, values: Mapping[str, float]) -> None:
        phases["first_step"] = time.time() - compiled_at
        _leave(phases, time.time() - began)

    for phase, names in PARTS.items():
        for name in names:
            setattr(loop, name, timed(phase, getattr(loop, name)))
    jit_step = loop.jit_step
    loop.jit_step = lambda *known: Jitted(jit_step(*known))
    loop.Terminal.write = written
    cli.main(["train", *arguments])


def _first_of_torch(began: float, arguments: Sequence[str]) -> None:
    import torch

    phases = {"imports": time.time() - began}
    # What the peer is made from is ours, and no part of PyTorch's start.
    from sarjax import recipes
    from sarjax.augment.inputs import channel_count
    from sarjax.bench.peers import peer
    from sarjax.data.declared import declared

    experiment, batch = recipes.find(arguments[1], arguments[2]).experiment, int(arguments[3])
    spec = declared(experiment.data.name, experiment.data.config).spec
    channels, side = channel_count(experiment.inputs, spec), experiment.augment.crop or 256
    start = time.time()
    network = peer(experiment.network, channels, spec.num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    made = time.time()
    images = torch.rand(batch, channels, side, side).to(memory_format=torch.channels_last)
    labels = torch.randint(spec.num_classes, (batch, side, side))
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    float(loss)
    phases |= {"first_state": made - start, "first_step": time.time() - made}
    _leave(phases, sum(phases.values()))
