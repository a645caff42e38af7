"""Transport of pixels to classes: equal to public solvers, exact rows, and what batches hold that is awkward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.losses import transport as ot
from sarjax.train.collectives import collectives, totals

transport = jax.jit(ot.transport, static_argnames=("epsilon", "tau_pixels", "tau_classes", "iterations"))
BALANCED = [f"bal{i:02}" for i in range(32)]
UNBALANCED = [f"unb{i:02}" for i in range(30)]


def tau_of(rho, epsilon):
    return 1.0 if rho == "inf" else float(rho) / (float(rho) + epsilon)


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_plans_of_the_oracle(oracle, name):
    data, description = oracle("sinkhorn")
    case = description["cases"][name]
    cost, a, b = (data[f"{name}/{x}"] for x in ("cost", "a", "b"))
    for iterations, key in ((3, "it3"), (50, "it50")):
        plan = transport(cost, a, b, epsilon=case["eps"], iterations=iterations)
        expected = data[f"{name}/{key}/plan"]
        np.testing.assert_allclose(plan.matrix, expected, rtol=0, atol=3e-5 * expected.max())
        np.testing.assert_allclose(plan.matrix.sum(1), a, rtol=1e-4)
        np.testing.assert_allclose(plan.error, np.abs(expected.sum(0) - b).sum(), atol=3e-5)
    converged = transport(cost, a, b, epsilon=case["eps"], iterations=int(data[f"{name}/conv/iterations"]))
    expected = data[f"{name}/conv/plan"]
    np.testing.assert_allclose(converged.matrix, expected, rtol=0, atol=3e-5 * expected.max())


@pytest.mark.parametrize("name", UNBALANCED)
def test_unbalanced_plans_of_the_oracle(oracle, name):
    """A divergence from the product of the masses is an entropy with their logarithms in the cost."""
    data, description = oracle("sinkhorn")
    case = description["cases"][name]
    cost, a, b = (data[f"{name}/{x}"] for x in ("cost", "a", "b"))
    epsilon = case["eps"]
    if case["reg_type"] == "kl":
        cost = cost - epsilon * (np.log(a)[:, None] + np.log(b))
    plan = transport(
        cost,
        a,
        b,
        epsilon=epsilon,
        tau_pixels=tau_of(case["rho_rows"], epsilon),
        tau_classes=tau_of(case["rho_cols"], epsilon),
        iterations=case["iterations"],
    )
    expected = data[f"{name}/plan"]
    np.testing.assert_allclose(plan.matrix, expected, rtol=0, atol=3e-5 * expected.max())
    assert plan.error < 1e-4


def sinkhorn64(cost, a, b, epsilon, tau, iterations):
    """Plain loop in float64, class mass relaxed by tau; pixels without mass left out."""
    a, b = a / a.sum(), b / b.sum()
    kept = a > 0
    log_k = -cost[kept].astype(np.float64) / epsilon
    with np.errstate(divide="ignore"):
        u, log_b = np.zeros(kept.sum()), np.log(b)
    for _ in range(iterations):
        v = tau * (log_b - np.logaddexp.reduce(log_k + u[:, None], 0))
        u = np.log(a[kept]) - np.logaddexp.reduce(log_k + v, 1)
    plan = np.zeros(cost.shape)
    plan[kept] = np.exp(u[:, None] + log_k + v)
    return plan


def problem(n, k, seed, empty=0.3):
    r = np.random.default_rng(seed)
    cost = r.uniform(0, 3, (n, k)).astype(np.float32)
    a = np.where(r.random(n) < empty, 0, r.uniform(0.1, 5, n)).astype(np.float32)
    a[0] = 1.0
    return cost, a, r.dirichlet(np.full(k, 0.5)).astype(np.float32) + 1e-4


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 60]), st.sampled_from([1, 2, 7]), st.integers(0, 2**30))
@pytest.mark.parametrize(("epsilon", "tau"), [(1.0, 1.0), (1.0, 0.5), (0.05, 1.0), (0.05, 0.5)])
def test_against_a_plain_loop(epsilon, tau, n, k, seed):
    cost, a, b = problem(n, k, seed)
    plan = transport(cost, a, b, epsilon=epsilon, tau_classes=tau, iterations=50)
    expected = sinkhorn64(cost, a, b, epsilon, tau, 50)
    np.testing.assert_allclose(plan.matrix, expected, rtol=0, atol=1e-4 * expected.max())
    np.testing.assert_allclose(plan.matrix.sum(1), a / a.sum(), rtol=1e-4, atol=1e-9)
    assert not plan.matrix[a == 0].any()
    np.testing.assert_allclose(plan.shares().sum(1), a > 0, rtol=1e-5)


def test_what_a_pixel_without_mass_holds_does_not_matter():
    cost, a, b = problem(40, 5, 0)
    wild = np.where(a[:, None] > 0, cost, np.random.default_rng(1).choice([np.nan, np.inf, -np.inf, 1e30], (40, 5)))
    for one, two in zip(*(transport(c, a, b, epsilon=0.1) for c in (cost, wild)), strict=True):
        assert np.array_equal(one, two)


def test_masses_have_no_unit_and_none_at_all_gives_nothing():
    cost, a, b = problem(40, 5, 0)
    one, two = (transport(cost, s * a, t * b, epsilon=0.1).matrix for s, t in ((1, 1), (1e-6, 1e6)))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-8)
    nothing = transport(cost, 0 * a, b, epsilon=0.1)
    assert not nothing.matrix.any()
    assert not nothing.shares().any()
    assert nothing.error == 0


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_a_class_without_mass_gets_none(tau):
    cost, a, b = problem(40, 5, 0)
    b[3] = 0
    plan = transport(cost, a, b, epsilon=0.1, tau_classes=tau, iterations=200)
    assert not plan.matrix[:, 3].any()
    np.testing.assert_allclose(plan.matrix.sum(1), a / a.sum(), rtol=1e-4)
    assert plan.error < 1e-3


def test_the_error_says_what_has_not_converged():
    """A rare class, a small epsilon: three iterations misplace much of the mass."""
    r = np.random.default_rng(0)
    cost = r.uniform(0, 1, (500, 4)).astype(np.float32)
    b = np.array([0.9, 0.07, 0.02, 0.01])
    errors = [float(transport(cost, np.ones(500), b, epsilon=0.05, iterations=n).error) for n in (3, 50, 1000)]
    assert errors[0] > 0.1
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    soft = [transport(cost, np.ones(500), b, epsilon=0.05, tau_classes=0.5, iterations=n) for n in (1, 200)]
    assert soft[0].error > 1e-3 > 10 * soft[1].error
    assert np.abs(np.asarray(soft[1].matrix.sum(0)) - b).sum() > 0.05, "relaxed: converged, and not on b"


def test_predictions_are_kept_where_they_have_the_frequencies_and_weighted_where_not():
    r = np.random.default_rng(0)
    p = r.dirichlet([2.0, 1.0, 0.5], 300).astype(np.float32)
    mean = p.mean(0)
    same = transport(ot.prediction_cost(p), np.ones(300), mean, epsilon=1.0)
    np.testing.assert_allclose(same.shares(), p, atol=2e-5)
    other = np.array([0.2, 0.3, 0.5])
    hard = transport(ot.prediction_cost(p), np.ones(300), other, epsilon=1.0)
    soft = transport(ot.prediction_cost(p), np.ones(300), other, epsilon=1.0, tau_classes=0.5)
    ratio = np.asarray(hard.shares()) / p
    np.testing.assert_allclose(ratio / ratio[:, :1], np.broadcast_to((ratio / ratio[:, :1])[0], p.shape), rtol=1e-3)
    np.testing.assert_allclose(hard.matrix.sum(0), other, atol=1e-5)
    between = np.asarray(soft.matrix.sum(0))
    off, before = (np.abs(x - other).sum() for x in (between, mean))
    assert 0.05 < off < 0.6 * before, "towards the frequencies, not all the way"


def test_prediction_cost():
    p = jnp.array([[1.0, 0.0], [0.25, 0.75]])
    np.testing.assert_allclose(ot.prediction_cost(p), [[0, 20], [np.log(4), np.log(4 / 3)]], rtol=1e-6)
    np.testing.assert_allclose(ot.prediction_cost(p, kind="linear"), 1 - p)
    with pytest.raises(ValueError, match="'log' and 'linear'"):
        ot.prediction_cost(p, kind="logs")


def test_prototype_cost():
    v = jnp.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0], [np.nan, 1.0]])
    mu = jnp.array([[5.0, 0.0], [0.0, 1.0], [7.0, 7.0]])
    seen, a = jnp.array([1, 1, 0]), jnp.array([1.0, 0.3, 1.0, 1.0, 0.0])
    cosine = np.array([[1, 0], [0, 1], [-1, 0], [0, 0]])
    expected = np.c_[(1 - cosine) / 2, np.ones(4)]
    expected /= expected[:, :2].mean()
    found = ot.prototype_cost(v, mu, seen, a)
    np.testing.assert_allclose(found[:4], expected, atol=1e-6)
    np.testing.assert_array_equal(ot.prototype_cost(v[:4], mu, 0 * seen, a[:4]), np.ones((4, 3)))
    assert np.isfinite(ot.prototype_cost(v[:4], mu, seen, 0 * a[:4])).all()


def test_class_frequencies():
    found = ot.class_frequencies(jnp.array([0.9995, 0.0005, 0.0]))
    np.testing.assert_allclose(found, np.array([0.9995, 0.001, 0.001]) / 1.0015, rtol=1e-5)
    np.testing.assert_allclose(ot.class_frequencies(jnp.array([0.9, 0.1]), "uniform"), [0.5, 0.5])


def test_nothing_flows_back():
    cost, a, b = (jnp.asarray(x) for x in problem(12, 3, 0))

    def total(p, v, mu, b):
        one = ot.transport(ot.prediction_cost(p), a, ot.class_frequencies(b), epsilon=1.0, iterations=5)
        two = ot.transport(ot.prototype_cost(v, mu, jnp.ones(3), a), a, b, epsilon=0.1, iterations=5)
        return jnp.sum(one.matrix[:, 0]) + one.error + jnp.sum(two.matrix[:, 0] ** 2) + two.error

    r = np.random.default_rng(0)
    args = jax.nn.softmax(cost), *(jnp.asarray(r.standard_normal(s), jnp.float32) for s in ((12, 4), (3, 4))), b
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*args):
        assert not gradient.any()


@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_over_eight_devices(epsilon):
    """The plan of the global batch: as on one device, and only sums over pixels travel."""
    cost, a, b = problem(8 * 512, 8, 3)
    a[: 8 * 64] = 0  # a device without any mass
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    step = jax.jit(
        partial(ot.transport, epsilon=epsilon, tau_classes=0.5),
        in_shardings=(rows, rows, whole),
        out_shardings=ot.Plan(rows, whole),
    )
    one = transport(cost, a, b, epsilon=epsilon, tau_classes=0.5)
    plan = step(cost, a, b)
    np.testing.assert_allclose(plan.matrix, one.matrix, rtol=0, atol=1e-8)  # of up to 7e-4
    np.testing.assert_allclose(plan.error, one.error, atol=1e-6)
    program = step.lower(cost, a, b).compile().as_text()
    assert set(totals(collectives(program))) == {"all-reduce"}
