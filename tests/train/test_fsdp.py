"""What `mesh.fsdp` cuts, what that saves on each device, and what it costs in bytes between them: of compiled steps."""

from collections import Counter

import jax
import numpy as np
import pytest
import toy

from sarjax import config
from sarjax.data.pipeline import Batches
from sarjax.methods import build_method
from sarjax.methods.record import Context, Schedule, Teacher
from sarjax.options import Supervised
from sarjax.train import mesh as meshes
from sarjax.train.mesh import make_mesh, put_batch
from sarjax.train.optimizer import make_optimizer
from sarjax.train.program import compile_step, device_bytes, part, small
from sarjax.train.state import born_sharded
from sarjax.train.step import jit_step

DATA = toy.dataset()
# Wide and shallow: 10 MB of parameters, activations of a row of 32 x 32 pixels below 1 MB.
WIDE = toy.config(
    Supervised(),
    network=toy.FCN(width=4.0, stages=1),
    optimizer=config.Optimizer(name="adamw", ema=0.99, clip=1.0),
).experiment
SHAPES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(scope="module")
def programs():
    return {shape: compile_step(WIDE, DATA, make_mesh(config.Mesh(*shape))) for shape in SHAPES}


def test_each_device_holds_its_part_of_parameters_optimizer_and_mean(programs):
    for (_, fsdp), program in programs.items():
        state = program.state
        large = [x for x in jax.tree.leaves((state.params, state.opt_state, state.ema)) if x.size >= meshes.SMALL]
        assert len(large) == 4 * 5, "kernels, their two moments and their mean"
        assert all(x.size == fsdp * np.prod(part(x)) for x in large)
        held = device_bytes((state, program.batch))
        arguments = program.compiled.memory_analysis().argument_size_in_bytes
        unread = sum(device_bytes(program.batch["labelled"][name]) for name in ("id", "position", "row_valid"))
        assert arguments == held - unread


def test_memory_of_a_device_falls_with_the_axis(programs):
    peaks = [programs[shape].peak for shape in SHAPES]
    assert peaks == sorted(peaks, reverse=True)
    # Of parameters, two moments, mean: a whole copy of the first, and its gradient, are there during the step.
    saved = np.array([device_bytes(programs[shape].state) for shape in SHAPES])
    assert np.all(np.diff(peaks) <= 0.95 * np.diff(saved)), "what is cut is not kept whole elsewhere"
    assert peaks[-1] < 0.45 * peaks[0]


def test_only_parameters_travel_and_each_once(programs):
    """Of 4 x 2 and the like: kernels are gathered once a step and their gradients summed; activations stay."""
    for shape, program in programs.items():
        params = jax.tree.leaves(program.state.params)
        cut = [x for x in params if part(x) != x.shape]
        assert bool(cut) == (shape[1] > 1)
        found = program.collectives()
        moved = [one for one in found if one.kind != "all-reduce"]
        assert {one.kind for one in moved} <= {"all-gather"}, "host devices have no reduce-scatter"
        assert Counter(one.shape for one in moved) == Counter(x.shape for x in cut)
        assert sum(one.size for one in moved) == sum(4 * x.size for x in cut)
        assert {one.axes(program.sizes) for one in moved} <= {("fsdp",)}
        # What is summed is a gradient, whole or cut, or a vector: of channels (batch-norm, biases), or a number.
        shapes = {x.shape for x in params if not small(x)} | {part(x) for x in params}
        sums = [one.shape for one in found if one.kind == "all-reduce" and one.shape not in shapes]
        assert all(sum(n > 1 for n in s) <= 1 and np.prod(s) <= 1024 for s in sums), sums
        assert Counter(program.purpose(one) for one in found)["rows"] == 0


def test_gradients_are_summed_once(programs):
    """Whole over fsdp, as host devices have no reduce-scatter, and then the parts over data."""
    for (data, fsdp), program in programs.items():
        large = [x for x in jax.tree.leaves(program.state.params) if x.size >= meshes.SMALL]
        cut, along = sum(4 * x.size for x in large), Counter()
        for one in program.collectives():
            if one.kind == "all-reduce" and one.shape in {x.shape for x in large} | {part(x) for x in large}:
                along[one.axes(program.sizes)] += one.size
        everyone = ("data",) if fsdp == 1 else ("fsdp",) if data == 1 else None
        if everyone:
            assert along == {everyone: cut}
        else:
            assert along in ({("fsdp",): cut, ("data",): cut // fsdp}, {("data", "fsdp"): cut})


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(meshes, "SMALL", 8)


def test_a_teacher_is_cut_and_gathered_too(everything_is_large):
    seen = toy.config(toy.Toy()).experiment
    built = build_method(Context(seen, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
    taught = Teacher(built, seen, DATA.spec, DATA.statistics)
    program = compile_step(toy.config(toy.Toy(taught=True)).experiment, DATA, make_mesh(config.Mesh(4, 2)), taught)
    assert device_bytes(program.frozen) < sum(4 * x.size for x in jax.tree.leaves(program.frozen))
    gathered = Counter(one.shape for one in program.collectives() if program.purpose(one) == "parameters")
    # Encoders of both; two heads of the student and the one of the teacher's two that is asked.
    assert (gathered[3, 3, 1, 16], gathered[1, 1, 16, 3]) == (2, 3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cut_state_trains_as_a_whole_one(everything_is_large, accumulate):
    cfg = toy.config(toy.Toy(moving=False), accumulate=accumulate, optimizer=config.Optimizer(name="sgd", ema=0.5))
    experiment, results = cfg.experiment, []
    method = build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
    tables = {"neighbours": np.full((12, 2), -1)}
    batches = Batches(DATA.split("train"), method.streams, batch_size=8, seed=0, tables=tables)
    optimizer = make_optimizer(experiment.optimizer)
    for shape, devices in ((config.Mesh(), 1), (config.Mesh(2, 4), 8)):
        mesh = make_mesh(shape, jax.devices()[:devices])
        state = born_sharded(method, optimizer, 0, True, mesh)
        assert state.params["encoder"]["kernel"].is_fully_replicated == (devices == 1)
        step = jit_step(method, experiment, lambda s: 0.05, state)
        losses = []
        for s in range(3):
            state, metrics = step(state, None, put_batch(mesh, batches[s]))
            losses.append(float(metrics["loss"]))
        results.append((losses, jax.device_get((state.params, state.ema))))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[1][1], results[0][1])
