"""A training step of ours beside PyTorch's, plain and compiled: `sarjax bench step RECIPE`.

All start from the same weights and learn from the same batch of noise, with the same network, objective and optimizer;
what is random in a step is turned off on both sides. The loss of their first step must agree, or nothing is reported.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarjax.augment.inputs import channel_count, channel_names, network_inputs
from sarjax.bench import timing
from sarjax.config import Augment, Experiment, Mesh
from sarjax.errors import UserError
from sarjax.methods.record import Method, Teacher, Tree, Variables
from sarjax.spec import IGNORE_LABEL
from sarjax.train.feed import check_shares
from sarjax.train.mesh import infer_sharding, make_mesh, place, put_batch
from sarjax.train.optimizer import learning_rate, make_optimizer
from sarjax.train.program import device_bytes, planned_batch, planned_method, planned_state
from sarjax.train.state import born_sharded
from sarjax.train.step import jit_step

STEPS = 10_000  # that the schedule is long: nothing changes during a benchmark
AGREE = {"float32": 1e-3, "bfloat16": 2e-2}  # of the first losses, relative
SENSORS = ("optical", "sar")

Say = Callable[[str], None]


def without_draws(experiment: Experiment) -> Experiment:
    """The experiment without what is random in a step or rises over steps."""
    method = dataclasses.replace(experiment.method, **experiment.method.STEADY)
    return dataclasses.replace(experiment, method=method, augment=Augment(flip=False, rotate=False), steps=STEPS)


def bench_step(
    experiment: Experiment,
    data: Any,
    *,
    mesh: Mesh | None = None,
    teacher: Teacher | None = None,
    repetitions: int = timing.REPETITIONS,
    peers: tuple[str, ...] = ("torch", "torch.compile"),
    say: Say = print,
) -> dict[str, Any]:
    """Seconds of a step and tiles per second, ours and PyTorch's in turn, and what share of the roofline is reached.

    A tile is a row of any stream: a step of DLLR reads a labelled and an unlabelled one.

    Args:
      experiment: what is trained; see `without_draws`.
      data: as `sarjax.data.declared.Described`.
      mesh: None = rows over all devices.
      teacher: what a student learns from; its weights are random.
      repetitions: timed steps of each side.
      peers: "torch", "torch.compile"; () = ours alone.

    Raises:
      UserError: rows that the mesh cannot share, what has no peer, torch that is not there, first losses that differ.
    """
    timing.check(repetitions)
    experiment = without_draws(experiment)
    if peers:
        _require_torch()
    devices = make_mesh(mesh or Mesh())
    method, _ = planned_method(experiment, data, teacher)
    rows = {name: round(stream.rows * experiment.batch_size) for name, stream in method.streams.items()}
    check_shares(rows, data.tile[0], dict(devices.shape), experiment)
    ours = Ours(experiment, data, devices, method, teacher)
    say(f"ours: compiled in {ours.compilation:.1f} s for {devices.size} device(s)")
    sides, losses = {"ours": ours.step}, {"ours": ours.first}
    if peers:
        from sarjax.bench.torch_step import TorchStep

        for name in peers:
            begun = time.perf_counter()
            side = TorchStep(experiment, ours.peer_arguments(), compiled=name == "torch.compile")
            losses[name] = side.step()
            say(f"{name}: first step in {time.perf_counter() - begun:.1f} s")
            sides[name] = side.step
        _check(losses, experiment.precision)
    say(f"timing {repetitions} steps of each side, in turn")
    found = timing.in_turns(sides, repetitions, settle=True)
    tiles = sum(rows.values())
    rates = timing.rates(experiment.precision)
    median = found["ours"]["median"]
    floor = max(ours.flops / rates["matrix_flops_per_second"], ours.bytes / rates["copy_bytes_per_second"])
    return {
        "benchmark": "step",
        "device": jax.devices()[0].device_kind,
        **timing.machine(*(["torch"] if peers else [])),
        "mesh": dict(devices.shape),
        "network": f"{experiment.network.NAME} {experiment.network.encoder} x{experiment.network.width:g}",
        "method": experiment.method.NAME,
        "precision": experiment.precision,
        "tile": list(data.tile),
        "rows": [
            {
                "side": name,
                "tiles": tiles,
                "seconds": spread,
                "tiles_per_second": tiles / spread["median"],
                "times_ours": spread["median"] / median,
                "first_loss": losses[name],
            }
            for name, spread in found.items()
        ],
        "flops": ours.flops,
        "bytes": ours.bytes,
        "state_bytes": ours.state_bytes,
        **rates,
        "roofline_seconds": floor,
        "roofline_share": floor / median,
    }


class Ours:
    """Our step with a state and a batch on the devices. first: its first loss."""

    def __init__(self, experiment: Experiment, data: Any, mesh: Any, method: Method, teacher: Teacher | None):
        self.experiment, self.data, self.teacher, self.method = experiment, data, teacher, method
        optimizer = experiment.optimizer
        state, _ = planned_state(method, experiment, teacher, mesh)
        self.state = born_sharded(method, make_optimizer(optimizer), experiment.seed, optimizer.ema > 0, mesh)
        self.start = jax.device_get((self.state.params, self.state.stats))
        self.frozen = None
        if teacher is not None:
            born = jax.jit(teacher.method.init)(jax.random.key(experiment.seed + 1))
            known = Variables(born.params, born.stats, {})
            self.frozen = jax.tree.map(place, known, infer_sharding(mesh, known))
        self.batch = noise(planned_batch(method, experiment, data, mesh), data.spec.num_classes)
        jitted = jit_step(method, experiment, learning_rate(optimizer, STEPS), state)
        self.on_device = put_batch(mesh, self.batch)
        begun = time.perf_counter()
        with jax.set_mesh(mesh):
            self.compiled = jitted.lower(state, self.frozen, self.on_device).compile()
        self.compilation = time.perf_counter() - begun
        cost = self.compiled.cost_analysis()
        self.flops, self.bytes = (float(cost[key]) * mesh.size for key in ("flops", "bytes accessed"))
        self.state_bytes = device_bytes(state)
        self.first = self.step()

    def step(self) -> float:
        self.state, metrics = self.compiled(self.state, self.frozen, self.on_device)
        return float(metrics["loss"])

    def peer_arguments(self) -> dict[str, Any]:
        """What a peer needs to take the same step: weights, images as the networks see them, labels."""
        if beside := [name for name in self.method.beside if name in self.start[0]]:
            raise UserError(
                f"the method trains {', '.join(beside)} beside its network, which no PyTorch peer has; a teacher "
                "with as many channels as its student, or --no-torch, is accepted."
            )
        experiment, spec, statistics = self.experiment, self.data.spec, self.data.statistics
        labelled = self.batch["labelled"]

        def images(rows: Mapping[str, np.ndarray], of: Experiment) -> np.ndarray:
            return np.asarray(network_inputs(rows, of.inputs, spec, statistics))

        batch = {"image": images(labelled, experiment), "label": labelled["label"]}
        if "unlabelled" in self.batch:
            batch["unlabelled"] = images(self.batch["unlabelled"], experiment)
        arguments = {
            "weights": self.start,
            "classes": spec.num_classes,
            "channels": channel_count(experiment.inputs, spec),
            "groups": [
                [i for i, name in enumerate(channel_names(experiment.inputs, spec)) if name.startswith(f"{m}[")]
                for m in SENSORS
            ],
            "batch": batch,
            "rate": float(learning_rate(experiment.optimizer, STEPS)(jnp.zeros((), jnp.int32))),
        }
        if self.teacher is not None:
            theirs = self.teacher.experiment
            batch["teacher_image"] = images(labelled, theirs)
            arguments["teacher"] = (
                theirs.network, channel_count(theirs.inputs, spec), jax.device_get(tuple(self.frozen)[:2])
            )  # fmt: skip
        return arguments


def noise(shapes: Tree, classes: int) -> dict[str, dict[str, np.ndarray]]:
    """A batch of those shapes: bands of noise, all with data, blocks of labels, a twentieth of them ignored."""
    rng = np.random.default_rng(0)
    batch: dict[str, dict[str, np.ndarray]] = {}
    for stream, leaves in shapes.items():
        batch[stream] = {}
        for name, leaf in leaves.items():
            if name in ("id", "row", "position"):
                value = np.arange(*leaf.shape)
            elif name == "row_valid" or name.endswith("_valid"):
                value = np.ones(leaf.shape)
            elif name.endswith("label"):
                b, h, w = leaf.shape
                blocks = rng.integers(0, classes, (b, -(-h // 16), -(-w // 16)))
                value = blocks.repeat(16, 1).repeat(16, 2)[:, :h, :w]
                value = np.where(rng.random(value.shape) < 0.05, IGNORE_LABEL, value)
            else:
                value = rng.integers(1, 256, leaf.shape)
            batch[stream][name] = value.astype(leaf.dtype)
        if stream == "unlabelled":
            batch[stream]["label"] = np.full_like(batch[stream]["label"], IGNORE_LABEL)
    return batch


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise UserError(
            "torch is not installed; pip install 'sarjax[bench]', or --no-torch for ours alone, would do."
        ) from e


def _check(losses: Mapping[str, float], precision: str) -> None:
    ours = losses["ours"]
    for name, loss in losses.items():
        if not math.isclose(loss, ours, rel_tol=AGREE[precision]):
            raise UserError(
                f"{name} begins with a loss of {loss:.6g} and ours with {ours:.6g}: they do not compute the same, so "
                "their times say nothing of each other."
            )
