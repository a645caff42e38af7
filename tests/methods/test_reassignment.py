"""What is remembered over batches, and the labels that plans give: by hand, and where there is nothing to go by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarjax.losses.transport import FLOOR, prediction_cost, prototype_cost, transport
from sarjax.methods import reassignment as module
from sarjax.methods.reassignment import cell_mass, expected_mass, initial, pseudo_labels, queued, remembered
from sarjax.models.resampling import resize_bilinear
from sarjax.options import LabelReassignment

K, D = 3, 4
rng = np.random.default_rng(0)


def unit64(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cells(b=2, h=3, w=2, seed=0):
    """Features, and the labelled share of each class in each cell; class 2 is absent, a cell is half ignored."""
    r = np.random.default_rng(seed)
    features = r.normal(size=(b, h, w, D)).astype(np.float32)
    label = r.integers(0, 2, (b, h, w))
    shares = np.eye(K, dtype=np.float32)[label]
    shares[0, 0, 0] *= 0.5
    shares[-1, -1, -1] = 0
    return features, shares


def test_prototypes_and_frequencies_by_hand():
    memory = initial({"sar": D}, K, 2)
    expected, sums, seen = np.zeros((K, D)), np.zeros(K), np.zeros(K, bool)
    for seed in range(3):
        features, shares = cells(seed=seed)
        if seed == 2:
            shares = shares[..., [2, 1, 0]]  # class 2 appears, class 0 is gone
        labelled = shares.sum((0, 1, 2))
        memory = jax.jit(remembered, static_argnums=4)(memory, {"sar": features}, {"sar": shares}, labelled, 0.9)
        count = shares.sum((0, 1, 2))
        for c in range(K):
            if count[c]:
                mean = np.einsum("bhw,bhwd->d", shares[..., c], unit64(features)) / count[c]
                expected[c] = 0.9 * expected[c] + 0.1 * mean if seen[c] else mean
        seen |= count > 0
        sums = 0.9 * sums + count / count.sum()
    np.testing.assert_allclose(memory["prototypes/sar"], expected, atol=1e-6)
    np.testing.assert_allclose(memory["frequencies"], sums, rtol=1e-6)
    np.testing.assert_array_equal(memory["seen/sar"], seen)


def test_nothing_labelled_changes_nothing():
    features, shares = cells()
    memory = remembered(initial({"sar": D}, K, 2), {"sar": features}, {"sar": shares}, shares.sum((0, 1, 2)), 0.9)
    again = remembered(memory, {"sar": features * np.nan}, {"sar": 0 * shares}, jnp.zeros(K), 0.9)
    jax.tree.map(np.testing.assert_array_equal, again, memory)


def test_the_queue_is_a_ring_of_mean_predictions():
    memory, means = initial({"a": D, "b": D}, K, 2), []
    r = np.random.default_rng(0)
    for step in range(5):
        p = {name: r.dirichlet(np.ones(K), (2, 3, 2)).astype(np.float32) for name in "ab"}
        mass = {name: r.random((2, 3, 2)).astype(np.float32) for name in "ab"}
        if step == 3:
            mass["b"] *= 0  # a head without data: this batch is not remembered
        memory = jax.jit(queued)(memory, p, mass)
        if step != 3:
            means.append((p["a"] * mass["a"][..., None]).sum((0, 1, 2)) / mass["a"].sum())
    assert memory["filled"] == 4
    np.testing.assert_allclose(memory["queue/a"], [means[2], means[3]], rtol=1e-5)


def test_the_class_mass_is_half_labelled_half_predicted():
    memory = initial({"a": D}, K, 4)
    np.testing.assert_allclose(expected_mass(memory, "a"), [1 / 3] * 3, rtol=1e-6)
    memory["frequencies"] = jnp.array([3.0, 1.0, 0.0])
    np.testing.assert_allclose(expected_mass(memory, "a"), [0.75, 0.25, 0])
    memory |= {"queue/a": jnp.array([[0.2, 0.2, 0.6]] * 2 + [[9.0, 9, 9]] * 2), "filled": jnp.int32(2)}
    np.testing.assert_allclose(expected_mass(memory, "a"), [0.475, 0.225, 0.3], rtol=1e-6)
    np.testing.assert_allclose(expected_mass(memory | {"filled": jnp.int32(9)}, "a").sum(), 1, rtol=1e-6)
    other = memory | {"queue/b": jnp.array([[1.0, 0, 0]] * 4)}
    np.testing.assert_allclose(expected_mass(other, "b"), [0.875, 0.125, 0], rtol=1e-6)
    np.testing.assert_array_equal(expected_mass(other, "a"), expected_mass(memory, "a"))


def scene(size=16, seed=0):
    """Logits at the image's size and at a quarter of it, features, where there are data, and a memory."""
    r = np.random.default_rng(seed)
    coarse = 2 * r.normal(size=(2, size // 4, size // 4, K)).astype(np.float32)
    logits = np.asarray(resize_bilinear(coarse, (size, size)))
    features = r.normal(size=(2, size // 4, size // 4, D)).astype(np.float32)
    there = np.ones((2, size, size), bool)
    there[0, :4] = False
    there[1, 5, 5] = False
    memory = initial({"sar": D}, K, 4)
    memory |= {
        "frequencies": jnp.array([0.5, 0.4, 0.1]),
        "seen/sar": jnp.array([1.0, 1.0, 0.0]),
        "prototypes/sar": jnp.asarray(r.normal(size=(K, D)), jnp.float32),
    }
    return logits, features, coarse, there, memory


def labels(options, *args, memory=None):
    _, features, coarse, there, known = args or scene()
    f = jax.jit(lambda *a: pseudo_labels(*a, "sar", options))
    return f(coarse, features, there, memory or known)


def options(**changed):
    return LabelReassignment(**{"prediction": False, "prototype": False} | changed)


def test_without_a_level_labels_are_the_likeliest_classes():
    logits, _, _, there, _ = scene()
    found = labels(options())
    p = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_array_equal(found.label, p.argmax(-1))
    np.testing.assert_array_equal(found.argmax, p.argmax(-1))
    np.testing.assert_allclose(found.weight, np.where(there, p.max(-1), 0), rtol=1e-6)
    sure = labels(options(threshold=0.7))
    np.testing.assert_allclose(sure.weight, np.where(p.max(-1) >= 0.7, found.weight, 0), rtol=1e-6)
    assert found.error == 0


@pytest.mark.parametrize(("mass", "tau"), [("soft", 0.3), ("hard", 1.0), ("uniform", 1.0)])
def test_the_prediction_level_by_hand(mass, tau):
    logits, _, coarse, there, _ = scene()
    found = labels(options(prediction=True, mass=mass, relaxation=0.3))
    asked = np.full(K, 1 / K) if mass == "uniform" else np.maximum([0.5, 0.4, 0.1], FLOOR)
    np.testing.assert_allclose(found.asked, asked / asked.sum(), rtol=1e-5)
    cost = prediction_cost(jax.nn.softmax(coarse.reshape(-1, K)))
    plan = transport(cost, cell_mass(there, (4, 4)).reshape(-1), found.asked, epsilon=1.0, tau_classes=tau)
    fine = resize_bilinear(plan.shares().reshape(2, 4, 4, K), (16, 16))
    np.testing.assert_array_equal(found.label, fine.argmax(-1))
    assert (found.label != found.argmax).any(), "some are reassigned"
    np.testing.assert_allclose(found.weight, np.where(there, jax.nn.softmax(logits).max(-1), 0), rtol=1e-5)
    np.testing.assert_allclose(found.error, plan.error, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 50])
def test_the_prototype_level_by_hand(iterations):
    _, features, _, there, memory = scene()
    found = labels(options(prototype=True, prototype_epsilon=0.2, epsilon=7.0, iterations=iterations, relaxation=0.9))
    mass = cell_mass(there, (4, 4)).reshape(-1)
    cost = prototype_cost(features.reshape(-1, D), memory["prototypes/sar"], memory["seen/sar"], mass)
    plan = transport(cost, mass, found.asked, epsilon=0.2, tau_classes=0.9, iterations=iterations)
    fine = resize_bilinear(plan.shares().reshape(2, 4, 4, K), (16, 16))
    np.testing.assert_array_equal(found.label, fine.argmax(-1))
    np.testing.assert_allclose(found.error, plan.error, rtol=1e-4, atol=1e-7)


def test_the_linear_cost_and_the_largest_error():
    _, _, coarse, there, _ = scene()
    few = {"cost": "linear", "epsilon": 0.05, "mass": "hard", "iterations": 2}
    found = labels(options(prediction=True, **few))
    cost = prediction_cost(jax.nn.softmax(coarse.reshape(-1, K)), kind="linear")
    plan = transport(cost, cell_mass(there, (4, 4)).reshape(-1), found.asked, epsilon=0.05, iterations=2)
    np.testing.assert_allclose(found.error, plan.error, rtol=1e-4)
    errors = [float(labels(options(**few, **{level: True})).error) for level in ("prediction", "prototype", "region")]
    assert len(set(errors)) == 3
    together = labels(options(**few, prediction=True, prototype=True, region=True))
    np.testing.assert_allclose(together.error, max(errors), rtol=1e-4)


def test_levels_that_disagree_do_not_count():
    one, two, both = (
        labels(options(prediction=a, prototype=b)) for a, b in ((True, False), (False, True), (True, True))
    )
    differ = np.asarray(one.label != two.label)
    assert 0.1 < differ.mean() < 0.9
    assert not np.asarray(both.weight)[differ].any()
    there = scene()[3]
    np.testing.assert_allclose(np.asarray(both.weight)[~differ], np.asarray(one.weight)[~differ], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(both.label)[~differ], np.asarray(one.label)[~differ])
    assert (np.asarray(both.weight)[~differ & there] > 0).all()


def test_an_unseen_class_is_the_dearest_for_prototypes():
    found = labels(options(prototype=True))
    assert (np.asarray(found.label) == 2).mean() < 0.15, "only as many as the class mass makes it"


def test_regions_are_constant_on_cells():
    """Of 8x8 cells of the grid, so 32 x 32 pixels; a region without data goes nowhere."""
    _, features, coarse, there, memory = scene(size=64)
    there[:] = True
    there[0, :32, :32] = False
    shares, error, _ = jax.jit(lambda *a: module.reassigned(*a, memory, "sar", options(region=True)))(
        jax.nn.softmax(coarse), features, cell_mass(there, (16, 16))
    )
    (region,) = shares.values()
    blocks = np.asarray(region).reshape(2, 2, 8, 2, 8, K)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :, :1, :, :1], blocks.shape))
    np.testing.assert_allclose(region.sum(-1)[0, 8:], 1, rtol=1e-5)
    assert not region[0, :8, :8].any()
    assert np.isfinite(error)


def test_regions_by_hand():
    """One region, half of which has no data: the means of the other half, on both costs."""
    _, features, coarse, there, memory = scene(size=32)
    there[:] = True
    there[1, :16] = False
    mass = cell_mass(there, (8, 8))
    p = np.asarray(jax.nn.softmax(coarse))
    (region,) = jax.jit(lambda *a: module.reassigned(*a, memory, "sar", options(region=True)))(p, features, mass)[
        0
    ].values()
    halves = [(slice(0, 1), slice(0, 8)), (slice(1, 2), slice(4, 8))]
    mean_p = np.stack([p[h].mean((0, 1, 2)) for h in halves])
    mean_v = np.stack([unit64(features)[h].mean((0, 1, 2)) for h in halves])
    weight, asked = jnp.array([1.0, 0.5]), jnp.maximum(jnp.array([0.5, 0.4, 0.1]), FLOOR)
    shares = [
        transport(cost, weight, asked, epsilon=epsilon, tau_classes=0.5).shares()
        for cost, epsilon in (
            (prediction_cost(mean_p), 1.0),
            (prototype_cost(mean_v, memory["prototypes/sar"], memory["seen/sar"], weight), 0.05),
        )
    ]
    np.testing.assert_allclose(region[:, 0, 0], sum(shares) / 2, rtol=1e-3, atol=1e-5)


def test_no_data_at_all():
    logits, features, coarse, there, memory = scene()
    found = labels(
        options(prediction=True, prototype=True, region=True), logits, features, coarse, 0 * there > 0, memory
    )
    assert not found.weight.any()
    assert found.error == 0
    assert np.isfinite(found.asked).all()


def test_no_gradient_reaches_the_predictions():
    _, features, coarse, there, memory = scene()

    def total(logits, features):
        found = pseudo_labels(logits, features, there, memory, "sar", LabelReassignment(region=True))
        return jnp.sum(found.weight) + found.error

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(coarse, features):
        assert not gradient.any()
