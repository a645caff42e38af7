"""One step: the same on any devices and in any number of microbatches; what is not finite changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from sarjax import config
from sarjax.data.pipeline import Batches
from sarjax.methods import build_method
from sarjax.methods.record import Context, Schedule, Teacher, Term
from sarjax.options import Distillation, Supervised
from sarjax.train.mesh import infer_sharding, make_mesh, put_batch
from sarjax.train.optimizer import decayed, learning_rate, make_optimizer
from sarjax.train.state import born_sharded, keys
from sarjax.train.step import make_step, microbatches, objective

DATA = toy.dataset()


def setup(cfg, mesh, teacher=None):
    experiment = cfg.experiment
    method = build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8), teacher))
    optimizer = make_optimizer(experiment.optimizer)
    ema = experiment.optimizer.ema
    state = born_sharded(method, optimizer, experiment.seed, ema > 0, mesh)
    step = make_step(
        method,
        optimizer,
        learning_rate(experiment.optimizer, experiment.steps),
        key=keys(experiment.seed)["step"],
        accumulate=experiment.accumulate,
        ema=ema,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, state.params),
    )
    tables = {"neighbours": np.full((12, 2), -1)}
    batches = Batches(
        DATA.split("train"), method.streams, batch_size=experiment.batch_size, seed=experiment.seed, tables=tables
    )
    return state, jax.jit(step), batches


def run(cfg, mesh_shape, devices, steps=3):
    mesh = make_mesh(mesh_shape, jax.devices()[:devices])
    state, step, batches = setup(cfg, mesh)
    losses = []
    for s in range(steps):
        state, metrics = step(state, None, put_batch(mesh, batches[s]))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def reference():
    return run(toy.config(toy.Toy()), config.Mesh(), 1)


@pytest.fixture(scope="module")
def at_rest():
    return run(toy.config(toy.Toy(moving=False)), config.Mesh(), 1)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize(("shape", "devices"), [(config.Mesh(), 1), (config.Mesh(), 2), (config.Mesh(2, 1), 2)])
def test_devices_and_microbatches_change_nothing(at_rest, shape, devices, accumulate):
    """With the statistics at rest, nothing in the toy method couples rows."""
    state, losses = run(toy.config(toy.Toy(moving=False), accumulate=accumulate), shape, devices)
    np.testing.assert_allclose(losses, at_rest[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(at_rest[0].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "devices"), [(config.Mesh(), 8), (config.Mesh(4, 2), 8), (config.Mesh(2, 2, 2), 8)])
def test_layouts_agree(reference, shape, devices):
    state, losses = run(toy.config(toy.Toy()), shape, devices)
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference[0].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(state.memory), jax.tree.leaves(reference[0].memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_batch_norm_is_global():
    cfg = toy.config(Supervised(), augment=config.Augment(flip=False, rotate=False))
    (one, a), (eight, b) = run(cfg, config.Mesh(), 1), run(cfg, config.Mesh(), 8)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(one.stats), jax.tree.leaves(eight.stats), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_objective_of_parts_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    totals, weights = rng.random((4, 2)).astype(np.float32), np.array([[3, 0], [1, 2], [0, 0], [5, 1]], np.float32)
    parts = [
        {n: Term(*map(jnp.asarray, (t[i], w[i], 0.5 + i))) for i, n in enumerate("ab")}
        for t, w in zip(totals, weights, strict=True)
    ]
    whole = dict(zip("ab", jnp.asarray(weights.sum(0)), strict=True))
    expected = sum((0.5 + i) * totals[:, i].sum() / weights[:, i].sum() for i in range(2))
    np.testing.assert_allclose(sum(objective(p, whole) for p in parts), expected, rtol=1e-6)
    nothing = {"a": Term(jnp.zeros(()), jnp.zeros(()))}
    assert objective(nothing, {"a": jnp.zeros(())}) == 0


@pytest.mark.parametrize("taught", [False, True])
def test_the_pass_for_the_weights_is_free(taught):
    """Weights depend on labels and data alone, so accumulating costs no second forward pass (some 10 convolutions)."""
    network = toy.FCN(width=0.25, stages=2)
    optical = toy.config(Supervised(), network=network, inputs=config.Inputs(modalities=("optical",))).experiment
    built = build_method(Context(optical, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
    teacher = Teacher(built, optical, DATA.spec, DATA.statistics) if taught else None
    frozen = jax.jit(built.init)(jax.random.key(1)) if taught else None

    def convolutions(accumulate):
        mesh = make_mesh(config.Mesh(), jax.devices()[:1])
        cfg = toy.config(Distillation() if taught else Supervised(), accumulate=accumulate, network=network)
        state, step, batches = setup(cfg, mesh, teacher)
        text = step.lower(state, frozen, put_batch(mesh, batches[0])).compile().as_text()
        return text.count(" convolution(")

    assert convolutions(2) - convolutions(1) <= 2


def test_microbatches_are_strided():
    parts = microbatches({"x": jnp.arange(8)}, 2)["x"]
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(accumulate):
    mesh = make_mesh(config.Mesh(), jax.devices()[:2])
    cfg = toy.config(toy.Toy(explode_at=1), accumulate=accumulate, optimizer=config.Optimizer(ema=0.9))
    state, step, batches = setup(cfg, mesh)
    state, _ = step(state, None, put_batch(mesh, batches[0]))
    after, metrics = step(state, None, put_batch(mesh, batches[1]))
    assert (int(after.step), int(after.skipped), int(after.bad_in_a_row)) == (2, 1, 1)
    assert int(metrics["skipped"]) == 1
    for name in ("params", "stats", "memory", "opt_state", "ema"):
        for a, b in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(state, name)), strict=True):
            np.testing.assert_array_equal(a, b, name)
    good, _ = step(after, None, put_batch(mesh, batches[2]))
    assert (int(good.skipped), int(good.bad_in_a_row)) == (1, 0)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(good.params), jax.tree.leaves(after.params), strict=True))


def test_ema_and_clip_are_optax():
    options = config.Optimizer(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, clip=0.01, ema=0.9, warmup=0)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    state, step, batches = setup(toy.config(toy.Toy(), optimizer=options), mesh)
    new, metrics = step(state, None, put_batch(mesh, batches[0]))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new.params, state.params))
    assert float(metrics["gradient_norm"]) > 0.01
    np.testing.assert_allclose(moved, 0.01 * float(metrics["learning_rate"]), rtol=1e-3)
    expected = optax.incremental_update(new.params, state.ema, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new.ema, expected)


def test_a_constant_rate_without_warm_up_trains():
    options = config.Optimizer(schedule="constant", warmup=0.0)
    _, losses = run(toy.config(toy.Toy(), optimizer=options), config.Mesh(), 1, steps=2)
    assert np.isfinite(losses).all()


def test_an_update_that_overflows_is_skipped():
    """The gradient is finite, the parameters after it would not be."""
    options = config.Optimizer(name="sgd", learning_rate=3e38, momentum=0.0, nesterov=False, weight_decay=1e3, warmup=0)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    state, step, batches = setup(toy.config(toy.Toy(), optimizer=options), mesh)
    new, metrics = step(state, None, put_batch(mesh, batches[0]))
    assert np.isfinite(metrics["gradient_norm"])
    assert int(new.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


@pytest.mark.parametrize(("tiles", "rows"), [(9, 7), (12, 8), (3, 8), (261, 8)])
def test_a_pass_ends_when_its_last_tile_is_read(tiles, rows):
    schedule = Schedule(100, tiles, rows)
    for step in range(60):
        assert schedule.epochs(step) == sum((q + 1) % tiles == 0 for q in range(step * rows))


def test_evaluations_are_an_epoch_apart_and_at_most_a_hundred():
    """Four labelled tiles in batches of eight would be evaluated after every step."""
    assert [Schedule(s, t, 8).cadence for s, t in ((1305, 261), (300, 4), (50, 4), (10_000, 261))] == [33, 3, 1, 100]


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_schedules(schedule):
    rate = learning_rate(config.Optimizer(learning_rate=2.0, schedule=schedule, warmup=0.1, power=1.5), 100)
    values = np.array([rate(s) for s in range(100)])
    assert 0 < values[0] < values[5] <= values[9] == pytest.approx(2.0)
    middle = {"poly": 2 * (1 - 45 / 90) ** 1.5, "cosine": 1.0, "constant": 2.0}[schedule]
    assert values[55] == pytest.approx(middle, rel=1e-5)
    assert values[99] == pytest.approx(2.0) if schedule == "constant" else values[99] < 0.05


def test_adamw_decays_kernels_only():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(config.Optimizer(name="adamw", weight_decay=0.5))
    direction, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(direction["kernel"], 0.5)
    np.testing.assert_allclose(direction["bias"], 0.0)
    assert decayed(params) == {"kernel": True, "bias": False}


def test_fsdp_shards_what_is_large():
    mesh = make_mesh(config.Mesh(4, 2))
    tree = {"params": {"kernel": jnp.zeros((3, 3, 128, 256)), "bias": jnp.zeros(256)}, "step": jnp.zeros(())}
    specs = jax.tree.map(lambda s: s.spec, infer_sharding(mesh, tree))
    assert specs["params"]["kernel"] == jax.sharding.PartitionSpec(None, None, None, "fsdp")
    assert specs["params"]["bias"] == specs["step"] == jax.sharding.PartitionSpec()
    state, _, _ = setup(toy.config(toy.Toy(), optimizer=config.Optimizer(name="adamw")), mesh)
    assert state.memory["bank"].sharding.spec == jax.sharding.PartitionSpec("fsdp", None)
    assert state.params["encoder"]["kernel"].is_fully_replicated


def test_mesh_that_does_not_fit():
    with pytest.raises(toy.UserError, match="product is 8"):
        make_mesh(config.Mesh(3, 3, 1))
    with pytest.raises(toy.UserError, match="product is 8"):
        make_mesh(config.Mesh(-1, 3, 1))
    with pytest.raises(toy.UserError, match="product is 8"):
        make_mesh(config.Mesh(-1, -1, 1))
    assert make_mesh(config.Mesh(2, 1, 1)).size == 2
    assert dict(make_mesh(config.Mesh(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "space": 2}


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    cfg = toy.config(Supervised(dice=1.0), precision="bfloat16")
    state, losses = run(cfg, config.Mesh(), 2, steps=2)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.stats))} == {jnp.dtype("float32")}
    exact = run(
        dataclasses.replace(cfg, experiment=dataclasses.replace(cfg.experiment, precision="float32")),
        config.Mesh(),
        2,
        2,
    )
    np.testing.assert_allclose(losses, exact[1], rtol=0.05)
    assert losses != exact[1]
