"""What a run would need on devices that are not there: memory, traffic, time, and the largest batch that fits.

Nothing is computed: steps are compiled for a small mesh of host devices, from shapes. What sharding rules decide is
exact; what a compiler decides is taken from the small mesh; what hardware decides is a simple model. `ESTIMATES` says
which is which, and a plan carries it.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from sarjax import config as configs
from sarjax.config import Experiment
from sarjax.errors import UserError
from sarjax.methods.record import Teacher
from sarjax.train.collectives import ring
from sarjax.train.devices import DeviceKind
from sarjax.train.feed import check_shares
from sarjax.train.mesh import AXES, make_mesh
from sarjax.train.program import (
    Program,
    abstract_mesh,
    compile_step,
    device_bytes,
    part,
    planned_batch,
    planned_method,
    planned_state,
)

EFFICIENCY = 0.3
EXACT = ("parameters", "optimizer", "mean", "statistics", "memory", "teacher", "batch")
ESTIMATES: dict[str, str] = {
    "temporaries": "estimate: of the step compiled by XLA for the CPU on the small mesh, with as many rows a device; "
    "other compilers fuse, pad and schedule differently",
    "collectives": "estimate: those of the small mesh's program, as many bytes of gathered parameters, parts of "
    "gradients by the rules, groups as large as the mesh; XLA for the CPU sums whole gradients over fsdp where others "
    "reduce and scatter, so there it is an upper bound",
    "rows": "estimate: what grows with the number of devices that share rows goes on along a line through two small "
    "meshes",
    "flops": "estimate: XLA's counts of operations and of bytes touched in the small mesh's program, a "
    "multiply-accumulate counting 2; the body of a loop counts once, and everything `accumulate` times; with a larger "
    "fsdp a device updates less than is counted",
    "time": "model: max(flops / (peak x efficiency), bytes / bandwidth), and then what is sent over the slower of the "
    "links it takes, in rings, nothing overlapped, without latency, input or evaluation",
    "largest batch": "estimate: temporaries on a line through two batch sizes, up to the memory that is usable",
}
CAVEAT = "Nothing of this was compared with a real pod or cluster."


class Asked(NamedTuple):
    """What is to be planned. data: a data set, or `Described`; sizes: of the whole mesh, {axis: devices}.

    notes: what was assumed, for who reads the plan.
    """

    experiment: Experiment
    data: Any
    sizes: Mapping[str, int]
    kind: DeviceKind
    teacher: Teacher | None = None
    efficiency: float = EFFICIENCY
    notes: tuple[str, ...] = ()


def small_mesh(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """The mesh of at most `limit` devices that is most like `sizes`.

    An axis that is longer than 1 stays so; space stays whole before fsdp, fsdp before data, since a device's part of a
    tile and of a kernel shape its program, and the number of rows elsewhere does not. UserError for too few devices.
    """
    divisors = {axis: [n for n in range(1, min(sizes[axis], limit) + 1) if sizes[axis] % n == 0] for axis in AXES}
    fits = [
        {"data": d, "fsdp": f, "space": s}
        for d in range(1, min(sizes["data"], limit) + 1)
        for f in divisors["fsdp"]
        for s in divisors["space"]
        if d * f * s <= limit
    ]
    if not (alike := [m for m in fits if all((m[axis] > 1) == (sizes[axis] > 1) for axis in AXES)]):
        least = (min(2, sizes["data"]), *(_divisor(sizes[axis]) for axis in ("fsdp", "space")))
        raise UserError(
            f"--compile-devices is {limit}, too few for a mesh with the axes of data {sizes['data']} x fsdp "
            f"{sizes['fsdp']} x space {sizes['space']}; {math.prod(least)} or more are accepted."
        )
    return max(alike, key=lambda m: (m["space"], m["fsdp"], m["data"]))


def _divisor(n: int) -> int:
    """The smallest divisor above 1; 1 of 1."""
    return next((d for d in range(2, n + 1) if n % d == 0), 1)


def fitting_batch(experiment: Experiment, sizes: Mapping[str, int]) -> int:
    """The smallest batch from the experiment's on that the mesh can share equally."""
    unit = sizes["data"] * sizes["fsdp"] * experiment.accumulate
    return -(-experiment.batch_size // unit) * unit


def plan(asked: Asked, *, limit: int = 8, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The plan, as plain values. limit: devices of the small mesh; twice as many have to be there.

    UserError where batch or tiles cannot be shared by the mesh.
    """
    sizes, experiment, kind = dict(asked.sizes), asked.experiment, asked.kind
    shards = sizes["data"] * sizes["fsdp"]
    method, _ = planned_method(experiment, asked.data, asked.teacher)
    rows = {name: round(s.rows * experiment.batch_size) for name, s in method.streams.items()}
    check_shares(rows, asked.data.tile[0], sizes, experiment)

    small = small_mesh(sizes, limit)
    for line in asked.notes:
        say(line)

    # ------------------------------------------------ exact, by the sharding rules
    mesh = abstract_mesh(sizes)
    state, frozen = planned_state(method, experiment, asked.teacher, mesh)
    held = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "mean": state.ema,
        "statistics": state.stats,
        "memory": state.memory,
        "teacher": frozen,
        "batch": planned_batch(method, experiment, asked.data, mesh),
    }
    memory: dict[str, Any] = {name: device_bytes(tree) for name, tree in held.items()}

    # ------------------------------------------------------ compiled, on a small mesh
    unit = experiment.batch_size // shards  # of a device
    compiled: list[dict[str, Any]] = []

    def compiled_for(mesh_sizes: Mapping[str, int], per_device: int) -> Program:
        batch = per_device * mesh_sizes["data"] * mesh_sizes["fsdp"]
        shape = " x ".join(f"{axis} {n}" for axis, n in mesh_sizes.items() if n > 1) or "one device"
        say(f"compiling the step for {shape}, {per_device} rows a device (batch {batch})")
        began = time.monotonic()
        devices = jax.devices()[: math.prod(mesh_sizes.values())]
        other = dataclasses.replace(experiment, batch_size=batch)
        found = compile_step(other, asked.data, make_mesh(configs.Mesh(**mesh_sizes), devices), asked.teacher)
        compiled.append({"mesh": dict(mesh_sizes), "batch": batch, "seconds": round(time.monotonic() - began, 1)})
        return found

    program = compiled_for(small, unit)
    larger = compiled_for(small, 2 * unit)
    growth: Program | None = None
    if _grows(program) and small["data"] * small["fsdp"] < shards:
        wider = small | {"data": 2 * small["data"]} if small["data"] < sizes["data"] else None
        wider = wider or small | {"fsdp": 2 * small["fsdp"]}
        growth = compiled_for(wider, unit)

    at = lambda value: _along(value, program, growth, shards)  # noqa: E731
    memory["temporaries"] = round(at(lambda p: p.temporaries))
    memory["total"] = sum(memory.values())
    memory["usable"] = round(kind.memory * kind.usable)

    traffic = list(_traffic(program, growth, sizes, state, kind))
    flops = at(lambda p: _cost(p, "flops")) * experiment.accumulate
    moved = at(lambda p: _cost(p, "bytes accessed")) * experiment.accumulate

    # -------------------------------------------------------------------- a model
    peak = kind.bfloat16 if experiment.precision == "bfloat16" else kind.float32
    seconds = {
        "computing": flops / (peak * asked.efficiency),
        "memory": moved / kind.bandwidth,
        "sending": sum(one["seconds"] for one in traffic),
    }
    seconds["step"] = max(seconds["computing"], seconds["memory"]) + seconds["sending"]
    slope = (larger.temporaries - program.temporaries) / unit
    return {
        "notes": list(asked.notes),
        "batch": experiment.batch_size,
        "devices": math.prod(sizes.values()),
        "mesh": sizes,
        "kind": {key: list(v) if isinstance(v, tuple) else v for key, v in kind._asdict().items()},
        "precision": experiment.precision,
        "compiled": {"exactly": small == sizes, "programs": compiled, "jax": jax.__version__},
        "memory": memory,
        "collectives": traffic,
        "sent_bytes": sum(one["sent"] for one in traffic),
        "least_sent_bytes": least_sent(state, sizes),
        "flops": flops,
        "memory_traffic_bytes": moved,
        "efficiency": asked.efficiency,
        "seconds": seconds,
        "rows_per_second": experiment.batch_size / seconds["step"],
        "largest_batch": _largest(memory, slope, unit, shards, experiment.accumulate),
        "exact": list(EXACT),
        "estimates": ESTIMATES,
        "caveat": CAVEAT,
    }


def _cost(program: Program, what: str) -> float:
    return float((program.compiled.cost_analysis() or {}).get(what, 0.0))


def _grows(program: Program) -> bool:
    """Whether devices see rows of others, so that what one holds grows with their number."""
    return any(
        program.purpose(one) == "rows" and "space" not in one.axes(program.sizes) for one in program.collectives()
    )


def _shards(program: Program) -> int:
    return program.sizes["data"] * program.sizes["fsdp"]


def _along(value: Callable[[Program], float], program: Program, growth: Program | None, shards: int) -> float:
    """`value` for so many devices that share rows; constant where none sees rows of others. Never below what it is."""
    if growth is None:
        return value(program)
    slope = (value(growth) - value(program)) / (_shards(growth) - _shards(program))
    return value(program) + max(slope, 0.0) * (shards - _shards(program))


def _sums(program: Program) -> dict[tuple[str, str, tuple[str, ...]], tuple[int, int]]:
    """{(purpose, kind, axes): (arrays, bytes of results)} of a step; parts of gradients apart, as "gradient parts"."""
    leaves = jax.tree.leaves(program.state.params)
    parts = {part(x) for x in leaves if part(x) != x.shape}
    whole = {x.shape for x in leaves}
    found: dict[tuple[str, str, tuple[str, ...]], tuple[int, int]] = {}
    for one in program.collectives():
        purpose = program.purpose(one)
        axes = one.axes(program.sizes)
        if purpose == "gradients" and one.shape in parts - whole and "fsdp" not in axes:
            purpose = "gradient parts"
        count, size = found.get((purpose, one.kind, axes), (0, 0))
        found[purpose, one.kind, axes] = count + one.times, size + one.times * one.size
    return found


def _traffic(
    program: Program, growth: Program | None, sizes: Mapping[str, int], state: Any, kind: DeviceKind
) -> Iterable[dict[str, Any]]:
    """What one device sends in a step on the whole mesh, by purpose, kind and axes."""
    later = _sums(growth) if growth else {}
    shards = sizes["data"] * sizes["fsdp"]
    for (purpose, name, axes), (count, size) in sorted(_sums(program).items()):
        total = float(size)
        if purpose == "gradient parts":
            total *= program.sizes["fsdp"] / sizes["fsdp"]
        elif purpose in ("rows", "sums") and growth:
            other = later.get((purpose, name, axes), (0, size))[1]
            total += max(0.0, (other - size) / (_shards(growth) - _shards(program))) * (shards - _shards(program))
        devices = math.prod(sizes[axis] for axis in axes)
        sent = ring(name, round(total), devices)
        # Devices are numbered data first, space last: a group along data spans the others.
        span = math.prod(sizes[axis] for axis in AXES[AXES.index(axes[0]) :]) if axes else 1
        speed = kind.link if span <= kind.domain else kind.network
        yield {
            "purpose": "gradients" if purpose == "gradient parts" else purpose,
            "kind": name,
            "axes": list(axes),
            "devices": devices,
            "count": count,
            "bytes": round(total),
            "sent": round(sent),
            "seconds": sent / speed,
        }


def least_sent(state: Any, sizes: Mapping[str, int]) -> int:
    """The fewest bytes that one device sends in a step whose rows see nothing of each other.

    Each cut parameter is gathered once and its gradient reduced and scattered over fsdp, its part summed over data; the
    gradient of one that is not cut is summed over all devices.
    """
    total, everyone = 0.0, math.prod(sizes.values())
    for leaf in jax.tree.leaves(state.params):
        size, cut = leaf.size * leaf.dtype.itemsize, part(leaf) != leaf.shape
        if cut:
            own = size // sizes["fsdp"]
            total += ring("all-gather", size, sizes["fsdp"]) + ring("reduce-scatter", own, sizes["fsdp"])
            total += ring("all-reduce", own, everyone // sizes["fsdp"])
        else:
            total += ring("all-reduce", size, everyone)
    return round(total)


def _largest(memory: Mapping[str, int], slope: float, unit: int, shards: int, accumulate: int) -> dict[str, Any]:
    """The largest batch whose rows fit beside the state; 0 where not even one row a device does."""
    row = slope + memory["batch"] / unit
    fixed = memory["total"] - unit * row
    rows = max(0, int((memory["usable"] - fixed) // max(row, 1.0)))
    rows -= rows % accumulate
    return {
        "rows_per_device": rows,
        "batch": rows * shards,
        "bytes_per_row": round(row),
        "bytes_without_rows": round(fixed),
    }
