"""Scene clustering: what it adds to a method, whom it pairs, and that it is one loss over the global batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from sarjax.augment.geometry import geometry
from sarjax.augment.inputs import network_inputs
from sarjax.augment.radiometry import radiometry
from sarjax.config import Augment, Mesh
from sarjax.data.pipeline import Batches, evaluation_batches
from sarjax.errors import UserError
from sarjax.losses.contrastive import cluster_loss, instance_loss, unit
from sarjax.methods import build_method
from sarjax.methods.neighbours import ROWS, nearest, padded
from sarjax.methods.record import Context, Rest, Schedule
from sarjax.methods.scene_clustering import ROLE, _from_bank, with_scene_clustering
from sarjax.options import FCN, Clustering, LANet, SceneClustering, Supervised
from sarjax.train.collectives import collectives
from sarjax.train.feed import refreshed as refreshed_state
from sarjax.train.mesh import make_mesh, put_batch
from sarjax.train.state import create_state

DATA = toy.dataset(size=64)
TILES = len(DATA.split("train"))
INPUTS = toy.config(Supervised()).experiment.inputs
NETWORKS = {"fcn": FCN(width=0.0625, stages=2), "lanet": LANet(width=0.0625)}


def build(network="fcn", options=None, **clustering):
    """The method and its variables; an augmentation of the identity for the method's own view."""
    options = options or SceneClustering(clustering=Clustering(warmup=1, **clustering))
    experiment = toy.config(options, network=NETWORKS[network], augment=Augment(flip=False, rotate=False)).experiment
    method = build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
    return method, jax.jit(method.init)(jax.random.key(0))


def batch_of(method, variables, step=0, rows=8):
    tables = {"neighbours": np.asarray(variables.memory["neighbours"])} if "neighbours" in variables.memory else {}
    return Batches(DATA.split("train"), method.streams, batch_size=rows, seed=0, tables=tables)[step]


def terms(method, variables, batch, step=0):
    rest = Rest(None, variables.stats, variables.memory)
    return jax.jit(method.loss)(variables.params, rest, batch, jax.random.key(1), jnp.asarray(step, jnp.int32))


def objective(method, variables, batch):
    def value(params):
        found, _ = method.loss(
            params, Rest(None, variables.stats, variables.memory), batch, jax.random.key(1), jnp.zeros((), jnp.int32)
        )
        return sum(t.factor * t.mean() for t in found.values())

    return jax.jit(jax.value_and_grad(value))(variables.params)


def refreshed(method, variables, epoch=1, rows=8):
    batches = evaluation_batches(DATA.split("train"), rows)
    return variables._replace(
        memory=method.refresh(variables.params, variables.stats, variables.memory, batches, epoch)
    )


def test_table_3_by_switches():
    wanted = {(0.0, 0.0): set(), (1.0, 0.0): {"instance"}, (0.0, 1.0): {"cluster"}, (1.0, 1.0): {"instance", "cluster"}}
    plain, start = build(options=Supervised())
    for (instance, cluster), names in wanted.items():
        method, variables = build(instance=instance, cluster=cluster)
        found, outputs = terms(method, variables, batch_of(method, variables))
        assert set(found) - {"cross_entropy"} == names
        assert all(np.isfinite(float(t.mean())) for t in found.values())
        # The method's own part is the same to the bit, so that rows of one seed can be compared.
        own, own_outputs = terms(plain, start, batch_of(plain, start))
        np.testing.assert_array_equal(found["cross_entropy"].total, own["cross_entropy"].total)
        jax.tree.map(np.testing.assert_array_equal, outputs.stats, own_outputs.stats)
        base = {k: v for k, v in variables.params.items() if k != "scene_clustering"}
        jax.tree.map(np.testing.assert_array_equal, base, start.params)
        assert (method.scenes is None) == (cluster == 0)
        assert set(variables.params.get("scene_clustering", {})) == names, "no projector that nothing trains"
        if not names:
            assert method.streams == plain.streams


def test_weights_are_factors():
    method, variables = build(instance=0.5, cluster=0.25)
    found, outputs = terms(method, variables, batch_of(method, variables))
    assert {k: float(t.factor) for k, t in found.items()} == {"cross_entropy": 1, "instance": 0.5, "cluster": 0.25}
    metrics = {k: float(t.mean()) for k, t in outputs.metrics.items()}
    assert -1 <= metrics["partners_cosine"] <= 1
    assert 0.1 <= metrics["cluster_sureness"] <= 1
    assert 0 < metrics["cluster_evenness"] <= 1 + 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_the_objectives_reach_encoder_and_projectors(network):
    method, variables = build(network)
    _, gradients = objective(method, variables, batch_of(method, variables))
    plain, start = build(network, options=Supervised())
    _, without = objective(plain, start, batch_of(plain, start))
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradients["encoder"], without["encoder"])
    assert max(jax.tree.leaves(change)) > 1e-6
    for leaf in jax.tree.leaves(gradients["scene_clustering"]):
        assert float(jnp.abs(leaf).max()) > 0


def test_the_paper_counts_its_projectors():
    """Table 2, "our method": 2.91 M parameters."""
    experiment = toy.config(SceneClustering(), network=LANet()).experiment
    spec = dataclasses.replace(DATA.spec, classes=DATA.spec.classes[:1] * 7, excluded=())
    experiment = dataclasses.replace(experiment, inputs=dataclasses.replace(experiment.inputs, repeat=3))
    method = build_method(Context(experiment, spec, DATA.statistics, Schedule(6, 12, 8)))
    shapes = jax.eval_shape(method.init, jax.random.key(0)).params
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 2_909_984


def test_the_bank_holds_the_tiles_as_they_are_and_the_table_their_nearest():
    method, variables = build(neighbours=2)
    before = refreshed(method, variables, epoch=0).memory
    assert (np.asarray(before["neighbours"]) == -1).all(), "the warm-up has no neighbours"
    memory = {k: np.asarray(v) for k, v in refreshed(method, variables).memory.items()}
    assert memory["bank"].shape[0] == memory["neighbours"].shape[0] == padded(TILES) == ROWS
    for i, tile in enumerate(DATA.split("train")):
        rows = {k: v[None] for k, v in tile.items()}
        image = network_inputs(rows, toy.config(SceneClustering()).experiment.inputs, DATA.spec, DATA.statistics)
        features = method.encode(variables.params, variables.stats, image, False)
        np.testing.assert_allclose(memory["bank"][i], features[max(features)].mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    assert not memory["bank"][TILES:].any()
    rows = memory["bank"][:TILES] / np.linalg.norm(memory["bank"][:TILES], axis=1, keepdims=True)
    similarity = rows @ rows.T - 9 * np.eye(TILES)
    for i in range(TILES):
        found = memory["neighbours"][i]
        assert i not in found
        np.testing.assert_allclose(similarity[i][found], np.sort(similarity[i])[::-1][:2], atol=1e-5)
    assert (memory["neighbours"][TILES:] == -1).all()
    # Other batch sizes, whose last batch is filled up with rows that do not count, give the same.
    again = refreshed(method, variables, rows=5).memory
    np.testing.assert_allclose(again["bank"], memory["bank"], rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 4))
def test_nearest_is_exact(seed, count, k):
    rng = np.random.default_rng(seed)
    bank = np.zeros((512, 6), np.float32)
    bank[:count] = rng.normal(size=(count, 6))
    valid = np.arange(512) < count
    valid[rng.integers(0, count)] = False
    found = np.asarray(jax.jit(nearest, static_argnums=2)(jnp.asarray(bank), jnp.asarray(valid), k))
    rows = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    for i in range(512):
        others = [j for j in range(count) if valid[j] and j != i] if valid[i] else []
        kept = found[i][found[i] >= 0]
        assert len(kept) == min(k, len(others)) == len(set(kept))
        assert set(kept) <= set(others)
        wanted = np.sort([rows[i] @ rows[j] for j in others])[::-1][:k]
        np.testing.assert_allclose(rows[kept] @ rows[i], wanted, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_devices_share_the_search():
    rng = np.random.default_rng(0)
    bank, valid = rng.normal(size=(512, 6)).astype(np.float32), np.arange(512) < 500
    find = jax.jit(nearest, static_argnums=2)
    alone = np.asarray(find(bank, valid, 3))
    with jax.set_mesh(make_mesh(Mesh(2, 2, 2))):
        assert np.array_equal(find(bank, valid, 3), alone)
        program = find.lower(bank, valid, 3).compile().as_text()
    assert "f32[64,512]" in program, "the similarities of its 64 rows"
    assert "f32[256,512]" not in program
    assert [one.shape for one in collectives(program)] == [(512, 3)], "what was found is sent, and nothing else"


def test_partners_are_the_tile_or_its_neighbours():
    method, variables = build(neighbours=2)
    variables = refreshed(method, variables)
    table = np.asarray(variables.memory["neighbours"])
    met = set()
    for step in range(40):
        batch = batch_of(method, variables, step)
        for own, other in zip(batch["labelled"]["position"], batch["partner"]["position"], strict=True):
            assert other in {own, *table[own]}
            met.add(other == own)
    assert met == {True, False}
    alone, start = build(positives="augmentation")
    assert set(alone.streams) == {"labelled"}
    assert alone.refresh is None
    assert start.memory == {}


def test_features_of_the_bank_as_partners():
    method, variables = build(positives="bank", neighbours=2)
    assert set(method.streams) == {"labelled"}
    filled = refreshed(method, variables)
    batch = batch_of(method, variables)
    before, after = (terms(method, v, batch)[0]["instance"].mean() for v in (variables, filled))
    assert before != after
    emptied = filled._replace(memory=filled.memory | {"neighbours": variables.memory["neighbours"]})
    np.testing.assert_array_equal(terms(method, emptied, batch)[0]["instance"].mean(), before)
    # Only what the table names is read.
    named = {int(j) for i in batch["labelled"]["position"] for j in filled.memory["neighbours"][i]}
    (unnamed, *_) = {*range(ROWS)} - named
    for position, moves in ((named.pop(), None), (unnamed, False)):
        moved = filled._replace(memory=filled.memory | {"bank": filled.memory["bank"].at[position].add(1.0)})
        found = terms(method, moved, batch)[0]["instance"].mean()
        assert np.isfinite(found)
        assert moves is None or found == after


def test_eight_devices_see_the_global_batch():
    method, variables = build("lanet")
    variables = refreshed(method, variables)
    batch = batch_of(method, variables, step=1)
    alone, gradients = objective(method, variables, batch)
    mesh = make_mesh(Mesh())
    assert mesh.size == 8
    found, sharded = objective(method, variables, {k: put_batch(mesh, v) for k, v in batch.items()})
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients))))
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradients, sharded)
    assert max(jax.tree.leaves(difference)) < 1e-4 * norm


def test_scenes_are_shares():
    method, variables = build()
    shares = method.scenes(variables.params, variables.stats, batch_of(method, variables)["labelled"])
    assert shares.shape == (8, 10)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)


def test_a_tiles_clusters_do_not_depend_on_its_batch():
    method, variables = build()
    batch = batch_of(method, variables)["labelled"]
    whole = method.scenes(variables.params, variables.stats, batch)
    part = method.scenes(variables.params, variables.stats, {k: v[2:4] for k, v in batch.items()})
    np.testing.assert_allclose(part, whole[2:4], atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clusters": 1}, {"neighbours": 0}, {"neighbours": ROWS + 1}, {"warmup": -1}, {"instance_temperature": 0.0},
        {"cluster_temperature": -1.0}, {"instance": -1.0}, {"cluster": float("nan")}, {"hidden": 0},
        {"dimensions": 0}, {"region": 2.0}, {"jitter": -0.1}, {"speckle": -1.0}, {"speckle": float("inf")},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"method.clustering.{name} is {value}, but should be "):
        build(options=SceneClustering(clustering=Clustering(**wrong)))


def test_the_terms_by_hand():
    """Views, pairs, batch statistics, projectors and temperatures: rebuilt from their definitions, then compared."""
    options = Clustering(
        clusters=5, warmup=0, neighbours=2, region=0.6, jitter=0.3, speckle=3.0,
        instance_temperature=0.2, cluster_temperature=0.7, include_self=True,
    )  # fmt: skip
    method, variables = build(options=SceneClustering(clustering=options))
    variables = refreshed(method, variables, epoch=1)
    batch, key = batch_of(method, variables, step=1), jax.random.key(1)
    assert (batch["partner"]["position"] != batch["labelled"]["position"]).any()
    found, outputs = terms(method, variables, batch)

    one, other, _ = jax.random.split(jax.random.fold_in(key, ROLE), 3)
    changes = Augment(flip=True, rotate=True, region=0.6, jitter=0.3, speckle=3.0)
    views = []
    for rows, k in ((batch["labelled"], one), (batch["partner"], other)):
        where, how = jax.random.split(k)
        rows = radiometry(geometry(rows, where, changes), how, changes, DATA.spec)
        views.append(network_inputs(rows, INPUTS, DATA.spec, DATA.statistics))
    features = method.encode(variables.params, variables.stats, jnp.concatenate(views), True)
    h = features[max(features)].mean((1, 2))
    made = variables.params["scene_clustering"]

    def project(x, layers):
        hidden = np.maximum(x @ layers["linear0"]["kernel"] + layers["linear0"]["bias"], 0)
        return hidden @ layers["linear1"]["kernel"] + layers["linear1"]["bias"]

    z = [unit(project(x, made["instance"])) for x in (h[:8], h[8:])]
    y = [jax.nn.softmax(project(x, made["cluster"])) for x in (h[:8], h[8:])]
    for name, (total, weight) in {
        "instance": instance_loss(*z, temperature=0.2, include_self=True),
        "cluster": cluster_loss(*y, temperature=0.7, include_self=True),
    }.items():
        assert float(found[name].mean()) == pytest.approx(float(total / weight), rel=1e-4), name
    cosine = jnp.mean(jnp.sum(unit(h[:8]) * unit(h[8:]), -1))
    assert float(outputs.metrics["partners_cosine"].mean()) == pytest.approx(float(cosine), rel=1e-4)

    # A partner moves the auxiliary terms and nothing else.
    partner = batch["partner"] | {"sar": 255 - batch["partner"]["sar"]}
    moved, _ = terms(method, variables, batch | {"partner": partner})
    np.testing.assert_array_equal(moved["cross_entropy"].total, found["cross_entropy"].total)
    for name in ("instance", "cluster"):
        assert moved[name].total != found[name].total


def test_the_bank_is_drawn_from_evenly():
    """The tile's own view and each of its k neighbours, and only those that it has: (k + 1) equal chances."""
    memory = {
        "bank": jnp.arange(8.0)[:, None] + 1,
        "neighbours": jnp.asarray([[3, 5], [4, -1], [-1, -1]] + [[-1] * 2] * 5),
    }
    count = 3000
    for position, chances in (
        (0, {0.0: 1 / 3, 4.0: 1 / 3, 6.0: 1 / 3}),
        (1, {0.0: 1 / 2, 5.0: 1 / 2}),
        (2, {0.0: 1.0}),
    ):
        rows = {"position": jnp.full(count, position), "row": jnp.arange(count)}
        drawn = np.asarray(_from_bank(memory, rows, jnp.zeros((count, 1)), jax.random.key(0)))[:, 0]
        values, counts = np.unique(drawn, return_counts=True)
        assert set(values.tolist()) == set(chances)
        for value, n in zip(values.tolist(), counts, strict=True):
            assert n / count == pytest.approx(chances[value], abs=0.04)


def test_beside_a_method_that_refreshes_too():
    """Both see all batches, however the other iterates."""
    inner, _ = build(options=Supervised())

    def refresh(params, stats, memory, batches, epoch):
        return memory | {"seen": jnp.asarray(sum(len(b["row"]) for b in batches))}

    def init(key):
        return inner.init(key)._replace(memory={"seen": jnp.zeros((), jnp.int32)})

    experiment = toy.config(Supervised(), network=NETWORKS["fcn"]).experiment
    context = Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8))
    method = with_scene_clustering(inner._replace(init=init, refresh=refresh), Clustering(warmup=0), context)
    variables = jax.jit(method.init)(jax.random.key(0))
    state = create_state(variables, optax.sgd(0.1), False)
    moved = refreshed_state(method, state, DATA, toy.config(Supervised()), make_mesh(Mesh()), 1)
    assert int(moved.memory["seen"]) >= TILES
    assert (np.asarray(moved.memory["neighbours"][:TILES]) >= 0).all()
    twice = with_scene_clustering(method._replace(streams=inner.streams), Clustering(), context)
    with pytest.raises(ValueError, match="both have bank"):
        jax.eval_shape(twice.init, jax.random.key(0))


def test_a_run_without_neighbours_says_so():
    for steps, positives, said in ((8, "knn", True), (9, "knn", False), (8, "bank", True), (8, "augmentation", False)):
        experiment = toy.config(
            SceneClustering(clustering=Clustering(warmup=5, positives=positives)), network=NETWORKS["fcn"]
        ).experiment
        method = build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(steps, 12, 8)))
        assert bool(method.notes) == said, (steps, positives)
        assert all("within its warm-up of 5 epochs" in note for note in method.notes)
