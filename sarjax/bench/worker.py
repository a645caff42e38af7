"""Measures exported programs in a process of its own, with jax and numpy alone, as they are deployed.

    python worker.py CORES ROUNDS FILE...

CORES: cores that the process may use, set before jax starts, which sizes its thread pools by it; 0 = those it has.
ROUNDS: timed calls of every program, in turn. The last line of stdout is a JSON object: what ran, and for each FILE
what XLA says of it and the milliseconds of a call, from arrays in host memory to labels in host memory. Progress and
what went wrong go to stderr.
"""

import json
import os
import sys
import time
from typing import Any

WARM_UP = 3  # calls before the first that is timed
PROGRESS = "progress: "
EVERY = 10.0  # seconds between two lines


def main(cores: int, rounds: int, files: list[str]) -> dict[str, Any]:
    """What the module's first lines say. Memory of the process is of all that it holds: give one FILE for one."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    device = jax.devices()[0]
    start = most_resident()
    programs = [prepare(file) for file in files]
    said = time.perf_counter()
    milliseconds: list[list[float]] = [[] for _ in programs]
    for turn in range(rounds):
        for (call, batch, _), found in zip(programs, milliseconds, strict=True):
            found.append(timed(call, batch))
        if time.perf_counter() - said > EVERY:
            said = time.perf_counter()
            note(f"{turn + 1} of {rounds} rounds")
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "rss_start_bytes": start,
        "rss_peak_bytes": most_resident(),
        "programs": [
            {"file": file, **facts, **summary(found)}
            for file, (_, _, facts), found in zip(files, programs, milliseconds, strict=True)
        ],
    }


def prepare(file: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(compiled program, a batch for it, what XLA says of it), after calls that are not timed."""
    import jax
    import jax.export

    with open(file, "rb") as f:
        program = jax.export.deserialize(bytearray(f.read()))
    shapes = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]
    began = time.perf_counter()
    compiled = jax.jit(program.call).lower(shapes).compile()
    note(f"{os.path.basename(file)} compiled in {time.perf_counter() - began:.1f} s")
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    facts = {
        "xla_flops": costs and costs.get("flops"),
        "arguments_bytes": memory.argument_size_in_bytes,
        "outputs_bytes": memory.output_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
    }
    batch = stored_numbers(shapes)
    for _ in range(WARM_UP):
        timed(compiled, batch)
    return compiled, batch, facts


def stored_numbers(shapes: dict[str, Any]) -> dict[str, Any]:
    """Images of noise in their stored dtype, in host memory; every pixel holds data."""
    import numpy as np

    rng = np.random.default_rng(0)
    batch = {}
    for name, leaf in shapes.items():
        if name.endswith("_valid"):
            batch[name] = np.ones(leaf.shape, leaf.dtype)
        elif np.issubdtype(leaf.dtype, np.integer):
            batch[name] = rng.integers(1, np.iinfo(leaf.dtype).max, leaf.shape, leaf.dtype)
        else:
            batch[name] = rng.standard_normal(leaf.shape).astype(leaf.dtype)
    return batch


def timed(call: Any, batch: dict[str, Any]) -> float:
    """Milliseconds from a batch in host memory to its labels in host memory."""
    import numpy as np

    began = time.perf_counter()
    np.asarray(call(batch)["labels"])
    return 1e3 * (time.perf_counter() - began)


def summary(milliseconds: list[float]) -> dict[str, Any]:
    """Median and 99th percentile: a call that took place, so the slowest of fewer than 101."""
    import numpy as np

    p50, p99 = np.quantile(milliseconds, 0.5), np.quantile(milliseconds, 0.99, method="higher")
    return {"n": len(milliseconds), "p50_ms": float(p50), "p99_ms": float(p99)}


def most_resident() -> int | None:
    """Bytes of memory that this process has held at most so far; None where the system does not tell.

    Not `getrusage`, which starts from what the parent held.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            return next((1024 * int(line.split()[1]) for line in f if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def note(text: str) -> None:
    print(f"{PROGRESS}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
    except Exception as e:  # one line for the parent, whatever it was
        sys.exit(f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
