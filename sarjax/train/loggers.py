"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal."""

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sarjax.config import Config
from sarjax.data.pipeline import labelled_split
from sarjax.errors import UserError
from sarjax.files import write_atomically
from sarjax.methods.record import Method, Schedule
from sarjax.train.state import TrainState


def summary(
    state: TrainState,
    compiled: Any,
    config: Config,
    schedule: Schedule,
    method: Method,
    tiles: int,
    mesh: jax.sharding.Mesh,
) -> Iterator[str]:
    """What is known before step 0: size, cost, length, and what accumulation does not couple."""
    experiment = config.experiment
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    flops = cost.get("flops", 0.0)
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak -= memory.alias_size_in_bytes
    where = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    yield f"method {experiment.method.NAME}, network {experiment.network.NAME}: {parameters:,} parameters"
    yield f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s): {where}"
    yield f"a step: {flops / 1e9:.1f} GFLOP and {peak / 2**20:.0f} MiB per device, global batch {experiment.batch_size}"
    labelled = len(labelled_split(tiles, experiment.data.labelled, experiment.data.labelled_seed)[0])
    yield (
        f"{schedule.steps} steps, {schedule.steps_per_epoch:.1f} an epoch of {labelled} labelled tiles "
        f"({tiles} training tiles)"
    )
    if experiment.accumulate > 1 and method.couples:
        yield f"accumulating {experiment.accumulate} microbatches: {', '.join(method.couples)} see a microbatch only"
    yield from method.notes


class MetricsFile:
    """metrics.jsonl: one object a line, in the order of steps, none twice; UserError where it cannot be written.

    Opening it at step `start` drops rows of later steps: a resumed run writes them again.
    """

    def __init__(self, path: Path, start: int):
        self._path = path
        if path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= start]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN: a skipped step's loss is written as null.
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        except OSError as e:
            raise UserError(f"cannot write {self._path}: {e.strerror}; with room the same command goes on.") from e

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that `write` has complained of
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class TensorBoard:
    """Event files; steps after `start` of an earlier attempt are purged."""

    def __init__(self, directory: Path, start: int):
        with _without_torch():
            from tensorboardX import SummaryWriter

        # The name holds the second only: a resume within it would overwrite the file.
        self._writer = SummaryWriter(str(directory), purge_step=start + 1, filename_suffix=f".{start}")

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch from what is imported: tensorboardX would load it, for a second and a half, to know its tensors."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


class Terminal:
    """A progress bar with loss, tiles/s and time left; plain lines where the output is no terminal."""

    def __init__(self, start: int, steps: int, batch_size: int, *, silent: bool = False):
        self._stream = io.StringIO() if silent else sys.stderr
        self._steps, self._batch, self._first, self._began = steps, batch_size, start, time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("", total=steps, completed=start, text="")
            self._bar.start()

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        rate = (step - self._first) * self._batch / max(time.monotonic() - self._began, 1e-9)
        if any(k.startswith("val/") for k in values):
            shown = ", ".join(f"{k} {values[k]:.4f}" for k in ("val/miou", "val/pixel_accuracy") if k in values)
            self.say(f"step {step}/{self._steps}  {shown}")
        elif self._bar:
            self._bar.update(self._task, text=f"loss {values['loss']:.4f}  {rate:.1f} tiles/s")
        else:
            left = (self._steps - step) * self._batch / max(rate, 1e-9)
            self.say(
                f"step {step}/{self._steps}  loss {values['loss']:.4f}  {rate:.1f} tiles/s  "
                f"{time.strftime('%H:%M:%S', time.gmtime(left))} left"
            )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
