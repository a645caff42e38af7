"""FRD's losses: equal to RKD's public code, to float64 loops, over the global batch, and finite where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.losses import relational
from sarjax.losses.relational import (
    category_distance,
    difference_shares,
    drawn_channels,
    norm,
    pixel_distance,
    relational_distance,
    relative_distances,
    share_columns,
    share_divergence,
)
from sarjax.train.collectives import collectives, totals

LOSSES = {
    "pixel": pixel_distance,
    "pixel, plain": lambda s, t, cells: pixel_distance(s, t, cells, balanced=False),
    "category": category_distance,
    "shares": lambda s, t, cells: share_divergence(difference_shares(s, cells), difference_shares(t, cells), cells),
    "columns": lambda s, t, cells: share_columns(difference_shares(s, cells), difference_shares(t, cells), cells),
}


def value(loss, *args):
    total, weight = loss(*args)
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def draw(seed=0, classes=2, shape=(2, 5, 4), channels=(3, 7), ignored=0.3):
    """Student's and teacher's features, and cells: mixed, whole and ignored ones."""
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(shape[0], 2, *shape[1:], c)).astype(np.float32) for c in channels)
    cells = rng.dirichlet(np.full(classes, 0.3), shape).astype(np.float32) * rng.uniform(0.2, 1, (*shape, 1))
    cells *= rng.random((*shape, 1)) > ignored
    return student, teacher, cells.astype(np.float32)


def smooth_l1(x):
    x = np.abs(x)
    return np.where(x < 1, x * x / 2, x - 0.5)


# ------------------------------------------------------------------------------------------------- against references


@pytest.mark.parametrize("case", [f"rkd{i:02d}" for i in range(5)])
def test_distances_equal_the_public_code(oracle, case):
    """Of two rows, both distances are their own mean: loss and gradient are 0, not NaN."""
    arrays, description = oracle("rkd")
    s, t = (jnp.asarray(arrays[f"{case}/{k}"], jnp.float32) for k in "st")
    found, gradient = jax.value_and_grad(lambda s: value(relational_distance, s, t))(s)
    np.testing.assert_allclose(found, arrays[f"{case}/loss_d"], rtol=1e-5, atol=1e-7)
    (key,) = [k for k in ("grad_d", "grad_loss_d") if f"{case}/{k}" in arrays]
    np.testing.assert_allclose(gradient, arrays[f"{case}/{key}"], rtol=1e-3, atol=1e-6)
    assert description["cases"][case]["N"] == len(s)


def by_hand(student, teacher, cells):
    """All values in float64, pixel by pixel."""
    b, h, w, k = cells.shape
    pixels = [p for p in np.ndindex(b, h, w) if cells[p].sum() > 0]
    classes = [c for c in range(k) if cells[..., c].sum() > 0]
    dates = [{p: f[p[0], :, p[1], p[2]].astype(np.float64) for p in pixels} for f in (student, teacher)]
    count = {c: sum(float(cells[p][c]) for p in pixels) for c in classes}

    def balanced(loss):
        return np.mean([sum(float(cells[p][c]) * loss[p] for p in pixels) / count[c] for c in classes])

    ratio, centroids, shares = [], [], []
    for f in dates:
        d = {p: np.linalg.norm(x[0] - x[1]) for p, x in f.items()}
        mean = sum(cells[p].sum() * d[p] for p in pixels) / sum(cells[p].sum() for p in pixels)
        ratio.append({p: d[p] / mean for p in pixels})
        rows = [sum(float(cells[p][c]) * f[p][t] for p in pixels) / count[c] for t in range(2) for c in classes]
        psi = np.array([[np.linalg.norm(u - v) for v in rows] for u in rows])
        centroids.append(psi / psi[psi > 0].mean())
        z = {p: np.abs(x[0] - x[1]) / np.linalg.norm(x[0] - x[1]) for p, x in f.items()}
        mu = {c: sum(float(cells[p][c]) * z[p] for p in pixels) for c in classes}
        mu = {c: m / np.linalg.norm(m) for c, m in mu.items()}
        scores = {p: np.exp(np.array([z[p] @ mu[c] for c in classes]) / 0.1) for p in pixels}
        shares.append({p: x / x.sum() for p, x in scores.items()})
    l_pix = {p: smooth_l1(ratio[0][p] - ratio[1][p]) for p in pixels}
    mass = {p: cells[p].sum() for p in pixels}
    weights = {p: sum(float(cells[p][c]) / count[c] for c in classes) / len(classes) for p in pixels}
    kl = {p: np.sum(shares[1][p] * np.log(shares[1][p] / shares[0][p])) for p in pixels}

    def contrast(a, b):
        columns = [[x[p][i] * weights[p] ** 0.5 for p in pixels] for x in (a, b) for i in range(len(classes))]
        columns = [np.array(c) / np.linalg.norm(c) for c in columns]
        n, losses = len(classes), []
        for i in range(2 * n):
            others = [columns[i] @ columns[j] for j in range(2 * n) if j != i]
            losses.append(np.log(np.exp(others).sum()) - columns[i] @ columns[(i + n) % (2 * n)])
        return np.mean(losses)

    several = len(classes) > 1
    return {
        "pixel": balanced(l_pix),
        "pixel, plain": sum(mass[p] * l_pix[p] for p in pixels) / sum(mass.values()),
        "category": np.mean(smooth_l1(centroids[0] - centroids[1])),
        "shares": balanced(kl) if several else 0.0,
        "columns": contrast(*shares) - contrast(shares[1], shares[1]) if len(classes) == k and several else 0.0,
    }


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_by_hand(seed, classes):
    student, teacher, cells = draw(seed, classes)
    expected = by_hand(student, teacher, cells)
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(value(loss, student, teacher, cells), expected[name], rtol=2e-5, err_msg=name)
        assert expected[name] != 0


def test_weights_are_what_microbatches_add_up_by():
    """Classes that are there, mass of pixels, squared rows; one for the columns of a batch."""
    student, teacher, cells = draw(4, 4)
    cells[..., 2] = 0
    expected = {"pixel": 3, "pixel, plain": cells.sum(), "category": 36, "shares": 3}
    for name, weight in expected.items():
        assert float(LOSSES[name](student, teacher, cells)[1]) == pytest.approx(weight, rel=1e-5), name
    student, teacher, cells = draw(4)
    assert float(LOSSES["columns"](student, teacher, cells)[1]) == 1


@pytest.mark.parametrize("name", ["shares", "columns"])
def test_differences_of_next_to_nothing_have_a_bounded_gradient(name):
    """Their direction is noise: beside others of length 1 they count as shorter."""
    student, teacher, cells = draw(14, ignored=0)
    plain = jax.grad(lambda s: value(LOSSES[name], s, teacher, cells))(student)
    for size in (1e-4, 1e-7, 1e-11):
        student[0, 1, 0] = student[0, 0, 0] + size * np.sign(student[0, 1, 0])
        gradient = jax.grad(lambda s: value(LOSSES[name], s, teacher, cells))(student)
        assert np.abs(gradient).max() < 2e3 * np.abs(plain).max(), size


def test_an_absent_class_is_left_out():
    """Of two there is no contrast left: those terms weigh nothing. Of four, the three others are compared."""
    for classes in (2, 4):
        student, teacher, cells = draw(3, classes)
        cells[..., 1] = 0
        expected = by_hand(student, teacher, cells)
        for name, loss in LOSSES.items():
            np.testing.assert_allclose(value(loss, student, teacher, cells), expected[name], rtol=2e-5, atol=1e-7)
            gradient = jax.grad(lambda s, loss=loss, t=teacher, c=cells: value(loss, s, t, c))(student)
            assert np.isfinite(gradient).all(), name
            nothing = name == "columns" or (classes == 2 and name in ("shares", "category"))
            assert (float(loss(student, teacher, cells)[1]) == 0) == nothing, (name, classes)
            assert (np.abs(gradient).max() == 0) == nothing, (name, classes)


# ------------------------------------------------------------------------------------------------- what never changes


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0.01, 100), st.floats(0.01, 100))
def test_relations_have_no_scale_no_order_of_channels_and_no_first_date(seed, classes, ours, theirs):
    student, teacher, cells = draw(seed, classes)
    rng = np.random.default_rng(seed)
    for name, loss in LOSSES.items():
        found = value(loss, student, teacher, cells)
        other = value(
            loss, ours * student[..., rng.permutation(3)], theirs * teacher[..., rng.permutation(7)], 0.5 * cells
        )
        np.testing.assert_allclose(other, found, rtol=2e-3, atol=2e-5, err_msg=name)
        swapped = value(loss, student[:, ::-1], teacher[:, ::-1], cells)
        np.testing.assert_allclose(swapped, found, rtol=2e-3, atol=2e-5, err_msg=name)
        doubled = value(loss, *(np.concatenate([x, x]) for x in (student, teacher, cells)))
        np.testing.assert_allclose(doubled, found, rtol=2e-3, atol=2e-5, err_msg=f"{name}: a mean, not a sum")


@pytest.mark.parametrize("name", LOSSES)
def test_equal_relations_cost_nothing(name):
    """A student with its teacher's relations, in other channels and at another scale: 0; and gradient 0, but for the
    contrast of columns, which goes on pushing classes apart."""
    student, _, cells = draw(5)
    teacher = 3 * np.concatenate([np.zeros_like(student), student[..., ::-1]], -1)
    found, gradient = jax.value_and_grad(lambda s: value(LOSSES[name], s, teacher, cells))(student)
    assert abs(float(found)) < 1e-6
    if name != "columns":
        assert np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_dates_without_any_difference(name):
    """Identical dates in both networks: the loss is 0 and so is the gradient; in one of them: both are finite."""
    student, teacher, cells = draw(6)
    for f in (student, teacher):
        f[:, 1] = f[:, 0]
    # Of the category term the classes of one date still differ, so the same relations are needed.
    of = (lambda s: s) if name == "category" else (lambda s: teacher)
    found, gradient = jax.value_and_grad(lambda s: value(LOSSES[name], s, of(student), cells))(student)
    assert abs(float(found)) < 1e-6
    assert np.abs(gradient).max() < 1e-6
    different = draw(7)[1]
    found, gradient = jax.value_and_grad(lambda s: value(LOSSES[name], s, different, cells))(student)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()
    same = np.broadcast_to(np.float32(0.7), student.shape)
    found, gradient = jax.value_and_grad(lambda s: value(LOSSES[name], s, different, cells))(same)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_leaves_no_trace(name):
    student, teacher, cells = draw(8)
    hidden = cells.sum(-1) == 0
    assert 0 < hidden.sum() < hidden.size
    found, gradient = jax.value_and_grad(lambda s: value(LOSSES[name], s, teacher, cells))(student)
    for f in (student, teacher):
        np.moveaxis(f, 1, -1)[hidden] = np.nan
    again, same = jax.value_and_grad(lambda s: value(LOSSES[name], s, teacher, cells))(student)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(same, gradient)
    assert (np.moveaxis(np.asarray(same), 1, -1)[hidden] == 0).all()
    total, weight = LOSSES[name](student, teacher, 0 * cells)
    assert (float(total), float(weight)) == (0, 0), "nothing counts"
    gradient = jax.grad(lambda s: value(LOSSES[name], s, teacher, 0 * cells))(student)
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient(name):
    student, teacher, cells = draw(9)
    assert (np.asarray(jax.grad(lambda t: value(LOSSES[name], student, t, cells))(teacher)) == 0).all()
    assert np.abs(jax.grad(lambda s: value(LOSSES[name], s, teacher, cells))(student)).max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_differences(name):
    """Through the student's own means too; in float64."""
    with jax.enable_x64(True):
        student, teacher, cells = (jnp.asarray(x, jnp.float64) for x in draw(10, shape=(1, 2, 3), ignored=0.1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jnp, "float32", jnp.float64)
            f = lambda s: value(LOSSES[name], s, teacher, cells)  # noqa: E731
            gradient = np.asarray(jax.grad(f)(student))
            rng = np.random.default_rng(0)
            for _ in range(3):
                v = rng.normal(size=student.shape)
                slope = (f(student + 1e-6 * v) - f(student - 1e-6 * v)) / 2e-6
                np.testing.assert_allclose((gradient * v).sum(), slope, rtol=1e-4, atol=1e-7)


def test_eight_devices_equal_one_and_no_pixel_is_gathered():
    student, teacher, cells = draw(11, shape=(8, 6, 6))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    for name, loss in LOSSES.items():
        step = jax.jit(jax.value_and_grad(lambda s, t, c, loss=loss: value(loss, s, t, c)))
        one = step(student, teacher, cells)
        many = step(*(jax.device_put(x, rows) for x in (student, teacher, cells)))
        np.testing.assert_allclose(many[0], one[0], rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(many[1], one[1], rtol=1e-4, atol=1e-7, err_msg=name)
        program = step.lower(*(jax.device_put(x, rows) for x in (student, teacher, cells))).compile().as_text()
        assert set(totals(collectives(program))) == {"all-reduce"}, name


# ------------------------------------------------------------------------------------------------------ small functions


def test_drawn_channels_are_a_choice_of_channels():
    """Distances of masked features are those of the features of the chosen channels alone."""
    key = jax.random.key(3)
    chosen = np.asarray(drawn_channels(key, 9, 4))
    assert sorted(chosen) == [0] * 5 + [1] * 4
    np.testing.assert_array_equal(chosen, drawn_channels(key, 9, 4))
    draws = {tuple(np.asarray(drawn_channels(jax.random.key(i), 9, 4))) for i in range(20)}
    assert len(draws) > 10
    assert np.asarray(drawn_channels(key, 5, 5)).all()
    student, teacher, cells = draw(12, channels=(4, 9))
    for name in ("pixel", "category"):
        masked = value(LOSSES[name], student, teacher * chosen, cells)
        np.testing.assert_allclose(masked, value(LOSSES[name], student, teacher[..., chosen > 0], cells), rtol=1e-5)


def test_one_pixel_and_one_row():
    student, teacher, _ = draw(13, shape=(1, 1, 1))
    cells = np.full((1, 1, 1, 2), [0.25, 0.5], np.float32)
    for name, loss in LOSSES.items():
        found, gradient = jax.value_and_grad(lambda s, loss=loss: value(loss, s, teacher, cells))(student)
        assert np.isfinite(found), name
        assert np.isfinite(gradient).all(), name
    np.testing.assert_array_equal(relative_distances(jnp.ones((1, 3))), [[0.0]])
    assert float(relational_distance(jnp.ones((1, 3)), jnp.ones((1, 2)))[0]) == 0


def test_the_norm_of_nothing_has_no_gradient():
    np.testing.assert_array_equal(jax.grad(lambda x: norm(x).sum())(jnp.zeros((2, 3))), np.zeros((2, 3)))
    assert float(norm(jnp.array([3.0, 4.0]))) == 5.0


def test_doctests():
    import doctest

    assert doctest.testmod(relational).failed == 0
