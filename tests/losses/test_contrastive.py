"""The contrastive objectives: equal to the public code, over the global batch, and finite where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.losses.contrastive import cluster_loss, instance_loss, unit

CASES = [f"case{i:02d}" for i in range(9)]


def value(loss, *args, **options):
    total, weight = loss(*args, **options)
    return total / weight


def reference(a, b, temperature, include_self):
    """-log of the share of the partner, one row at a time, in float64."""
    z = np.concatenate([a, b]).astype(np.float64)
    n = len(a)
    losses = []
    for i in range(2 * n):
        others = [k for k in range(2 * n) if include_self or k != i]
        scores = np.array([z[i] @ z[k] for k in others]) / temperature
        losses.append(
            np.log(np.exp(scores - scores.max()).sum()) + scores.max() - z[i] @ z[(i + n) % (2 * n)] / temperature
        )
    return np.mean(losses)


def close_gradient(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_instance_loss_equals_the_public_code(oracle, case):
    arrays, description = oracle("contrastive")
    x = {k: arrays[f"{case}/{k}"] for k in ("x_a", "x_b", "z_a", "z_b")}
    tau = description["cases"][case]["tau_instance"]
    for include_self, key in ((False, "ins_loss"), (True, "ins_loss_selfterm")):
        found = value(instance_loss, x["z_a"], x["z_b"], temperature=tau, include_self=include_self)
        np.testing.assert_allclose(found, arrays[f"{case}/{key}"], rtol=1e-5)

    def of_z(a, b):
        return value(instance_loss, a, b, temperature=tau)

    for found, view in zip(jax.grad(of_z, (0, 1))(x["z_a"], x["z_b"]), "ab", strict=True):
        close_gradient(found, arrays[f"{case}/grad_z_{view}"])
    of_x = jax.grad(lambda a, b: of_z(unit(a), unit(b)), (0, 1))
    for found, view in zip(of_x(x["x_a"], x["x_b"]), "ab", strict=True):
        close_gradient(found, arrays[f"{case}/grad_x_{view}"])


@pytest.mark.parametrize("case", CASES)
def test_cluster_loss_equals_the_public_code(oracle, case):
    arrays, description = oracle("contrastive")
    c = [arrays[f"{case}/c_{view}"] for view in "ab"]
    logits = [arrays[f"{case}/logits_{view}"] for view in "ab"]
    tau = description["cases"][case]["tau_cluster"]
    for include_self, key in ((False, "clu_loss"), (True, "clu_loss_selfterm")):
        found = value(cluster_loss, *c, temperature=tau, include_self=include_self)
        np.testing.assert_allclose(found, arrays[f"{case}/{key}"], rtol=1e-5, atol=1e-6)

    def of_c(a, b):
        return value(cluster_loss, a, b, temperature=tau)

    of_logits = jax.grad(lambda a, b: of_c(jax.nn.softmax(a), jax.nn.softmax(b)), (0, 1))
    for found, view in zip(jax.grad(of_c, (0, 1))(*c), "ab", strict=True):
        close_gradient(found, arrays[f"{case}/grad_c_{view}"])
    for found, view in zip(of_logits(*logits), "ab", strict=True):
        close_gradient(found, arrays[f"{case}/grad_logits_{view}"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9), st.floats(0.07, 2), st.booleans())
def test_random_batches_equal_a_slow_formula(seed, n, d, temperature, include_self):
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(unit(jnp.asarray(rng.normal(size=(n, d)), jnp.float32))) for _ in "ab")
    found = value(instance_loss, a, b, temperature=temperature, include_self=include_self)
    np.testing.assert_allclose(found, reference(a, b, temperature, include_self), rtol=1e-5, atol=1e-5)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in rng.normal(0, 2, (2, n, d)))
    columns = [(x / np.linalg.norm(x, axis=0)).T for x in (p, q)]
    size = np.stack([p.mean(0), q.mean(0)])
    wanted = reference(*columns, temperature, include_self) + (size * np.log(size)).sum() + 2 * np.log(d)
    found = value(cluster_loss, jnp.asarray(p), jnp.asarray(q), temperature=temperature, include_self=include_self)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_every_row_counts_the_same_and_views_are_alike():
    rng = np.random.default_rng(0)
    a, b = (unit(jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)) for _ in "ab")
    order = rng.permutation(6)
    np.testing.assert_allclose(value(instance_loss, a, b), value(instance_loss, b[order], a[order]), rtol=1e-6)
    p, q = jax.nn.softmax(3 * a), jax.nn.softmax(3 * b)
    columns = rng.permutation(5)
    found = value(cluster_loss, q[order][:, columns], p[order][:, columns])
    np.testing.assert_allclose(value(cluster_loss, p, q), found, rtol=1e-6)


def test_an_empty_or_one_sided_clustering_costs_more_than_a_balanced_one():
    balanced = jnp.eye(4)
    collapsed = jnp.zeros((4, 4)).at[:, 0].set(1.0)
    assert value(cluster_loss, balanced, balanced) + 1 < value(cluster_loss, collapsed, collapsed)


def nasty():
    eye, one = jnp.eye(4), jnp.zeros((4, 3)).at[:, 1].set(1.0)
    yield "identical views", jnp.tile(unit(jnp.ones((1, 4))), (4, 1)), eye
    yield "two rows", jnp.eye(2), jnp.eye(2)
    yield "one row", jnp.eye(1), jnp.eye(1)
    yield "rows of zeros", jnp.zeros((3, 4)), jnp.full((3, 4), 0.25)
    yield "one-hot, empty clusters", unit(jnp.ones((4, 2))), one


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize(("name", "z", "c"), list(nasty()))
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_finite_where_it_is_degenerate(name, z, c, include_self, temperature):
    options = {"include_self": include_self, "temperature": temperature}
    for loss, x in ((instance_loss, z), (cluster_loss, c)):
        found, gradient = jax.value_and_grad(lambda a, loss=loss, x=x: value(loss, a, x, **options))(x)
        assert np.isfinite(found), name
        assert np.isfinite(gradient).all(), name
    found = jax.grad(lambda x: value(instance_loss, unit(x), unit(x), **options))(z)
    assert np.isfinite(found).all(), name


def test_rows_of_length_one():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0], [1e15, 1e15]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0], [0, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()


@pytest.mark.parametrize("loss", [instance_loss, cluster_loss])
def test_eight_devices_give_the_loss_of_the_global_batch(loss):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 32, 10)), jnp.float32)
    head = unit if loss is instance_loss else jax.nn.softmax

    def objective(a, b):
        return value(loss, head(a), head(b))

    alone, gradients = jax.value_and_grad(objective, (0, 1))(*x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    step = jax.jit(jax.value_and_grad(objective, (0, 1)), in_shardings=(rows, rows), out_shardings=(None, (rows, rows)))
    found, sharded = step(*x)
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    for one, eight in zip(gradients, sharded, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5 * np.abs(one).max())
    # The mean over devices of what each sees alone is another loss.
    local = np.mean([objective(*x[:, i : i + 4]) for i in range(0, 32, 4)])
    assert abs(local - alone) > 1e-2


@pytest.mark.parametrize("loss", [instance_loss, cluster_loss])
def test_weights_are_rows(loss):
    total, weight = loss(jnp.eye(4), jnp.eye(4))
    assert float(weight) == (8 if loss is instance_loss else 4)
    np.testing.assert_allclose(total / weight, value(loss, jnp.eye(4), jnp.eye(4)))
