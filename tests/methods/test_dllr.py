"""DLLR's method: which rows teach which heads what, and that nothing of the hidden truth does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sarjax.augment.inputs import network_inputs
from sarjax.config import Augment, Data, Inputs, Mesh
from sarjax.data.pipeline import Batches
from sarjax.errors import UserError
from sarjax.losses.pixel import cross_entropy
from sarjax.methods import build_method
from sarjax.methods.dllr import HEADS, SENSORS, UNLABELLED, _withheld, complementary_loss
from sarjax.methods.record import Context, Rest, Schedule
from sarjax.options import DLLR, FCN, LabelReassignment
from sarjax.spec import IGNORE_LABEL
from sarjax.train import loop
from sarjax.train.mesh import make_mesh, put_batch

DATA = toy.dataset(size=64)
SMALL = DLLR(width=0.0625)
BOTH = Inputs(modalities=("sar", "optical"))
KEY = jax.random.key(1)
STILL = Augment(flip=False, rotate=False)
OFF = {"cell": 0, "dropout": 0.0, "complementary": 0.0, "cross": 0.0, "consistency": 0.0}
PLAIN = {"prediction": False, "prototype": False}


def context_of(options, *, network=SMALL, inputs=BOTH, labelled=0.5, augment=None):
    experiment = toy.config(
        options, network=network, inputs=inputs, augment=augment or STILL, data=Data("toy", labelled=labelled)
    ).experiment
    return Context(experiment, DATA.spec, DATA.statistics, Schedule(20, 12, 4))


def build(labelled=0.5, augment=None, **options):
    method = build_method(context_of(LabelReassignment(**options), labelled=labelled, augment=augment))
    variables = jax.jit(method.init)(jax.random.key(0))
    batch = Batches(DATA.split("train"), method.streams, batch_size=4, seed=0, labelled=labelled)[0]
    return method, variables, batch


def run(method, variables, batch, step=3):
    rest = Rest(None, variables.stats, variables.memory)
    return jax.jit(method.loss)(variables.params, rest, batch, KEY, jnp.asarray(step, jnp.int32))


def gradient(method, variables, batch, step=3):
    def value(params):
        terms, _ = method.loss(params, Rest(None, variables.stats, variables.memory), batch, KEY, jnp.int32(step))
        return sum(t.factor * t.mean() for t in terms.values())

    return jax.jit(jax.grad(value))(variables.params)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def seen_by(batch):
    """Where each head has data, of a batch that is not augmented."""
    where = {m: (batch[f"{m}_valid"] > 0).all(1) for m in SENSORS}
    return where | {"fused": where["sar"] | where["optical"]}


def outputs_of(method, variables, batch):
    """Logits of every head in inference, at the size of the image."""
    return {
        name: jax.jit(head.predict)(variables.params, variables.stats, batch) for name, head in method.heads.items()
    }


def test_all_parts_at_once():
    method, variables, batch = build(region=True, dice=0.5, augment=Augment(flip=True, rotate=True, speckle=3.0))
    terms, outputs = run(method, variables, batch)
    assert all(np.isfinite(t.total) and np.isfinite(t.weight) for t in terms.values())
    assert {name.rsplit("_", 1)[0] for name in terms} == {
        "cross_entropy", "dice", "complementary", "cross", "consistency",
    }  # fmt: skip
    assert jax.tree.structure(outputs.memory) == jax.tree.structure(variables.memory)
    assert jax.tree.structure(outputs.stats) == jax.tree.structure(variables.stats)
    assert outputs.memory["filled"] == 1
    assert all(0 <= outputs.metrics[f"pseudo_{name}"].mean() <= 1 for name in ("argmax", "reassigned", "weight"))
    assert outputs.metrics["transport_error"].mean() < 1e-2
    assert method.couples == ("batch-norm", "Dice", "transport")


def test_hidden_labels_teach_nothing():
    method, variables, batch = build()
    r = np.random.default_rng(0)
    gradients, memories = [], []
    for _ in range(2):
        noise = r.integers(0, 3, batch[UNLABELLED]["hidden_label"].shape).astype(np.uint8)
        noisy = batch | {UNLABELLED: batch[UNLABELLED] | {"hidden_label": noise}}
        gradients.append(gradient(method, variables, noisy))
        memories.append(run(method, variables, noisy)[1].memory)
    same(*gradients)
    same(*memories)


def test_supervision_of_each_head_where_it_has_data():
    """Without unlabelled rows: plain cross-entropy of three heads, under the batch's statistics."""
    method, variables, batch = build(labelled=1.0, unlabelled=0, dropout=0.0)
    assert list(method.streams) == ["labelled"]
    assert variables.memory == {}
    assert method.pseudo is None
    assert method.couples == ("batch-norm",)
    batch["labelled"]["sar_valid"][:, :, :20] = 0
    batch["labelled"]["optical_valid"][:, :, :, -9:] = 0
    terms, _ = run(method, variables, batch)
    assert set(terms) == {f"cross_entropy_{head}" for head in HEADS}
    rows, where = batch["labelled"], seen_by(batch["labelled"])
    for head in SENSORS:
        alone = build_method(context_of(LabelReassignment(unlabelled=0), labelled=1.0)).heads[head]
        assert alone.requires == (head, f"{head}_valid")
        label = np.where(where[head], rows["label"], IGNORE_LABEL)
        assert terms[f"cross_entropy_{head}"].weight == (label < 3).sum()
    total, weight = terms["cross_entropy_fused"].total, terms["cross_entropy_fused"].weight
    assert weight == (np.where(where["fused"], rows["label"], IGNORE_LABEL) < 3).sum()
    assert 0.1 < total / weight < 5


def test_cross_supervision_by_hand():
    """Each sensor by the other's likeliest class, the share of unlabelled pixels that both see; its weight rises."""
    options = OFF | PLAIN | {"cross": 0.6, "consistency": 0.4, "threshold": 0.4, "ramp": 0.5}
    method, variables, batch = build(**options)
    terms, _ = run(method, variables, batch, step=5)
    rows, where = batch[UNLABELLED], seen_by(batch[UNLABELLED])
    # In training the network sees the batch's statistics: those of the unlabelled rows alone give the labels.
    plain = build_method(context_of(LabelReassignment(**options)))
    found = _views(variables, batch, plain)
    labels, logits = found
    ramp = np.exp(-5 * (1 - 5 / 10) ** 2)
    for m, other in zip(SENSORS, SENSORS[::-1], strict=True):
        weight = np.where(where[m] & where[other], labels[other][1], 0)
        expected, _ = cross_entropy(logits[m], labels[other][0], pixel_weights=weight)
        term = terms[f"cross_{m}"]
        np.testing.assert_allclose(term.total, expected, rtol=1e-3)
        assert term.weight == (where[m] & where[other]).sum()
        np.testing.assert_allclose(term.factor, 0.6 * ramp, rtol=1e-5)
    for head, share in (("fused", 1.0), ("sar", 0.5), ("optical", 0.5)):
        weight = np.where(where[head] & where["fused"], labels["fused"][1], 0)
        expected, _ = cross_entropy(logits[head], labels["fused"][0], pixel_weights=weight)
        np.testing.assert_allclose(terms[f"consistency_{head}"].total, expected, rtol=1e-3)
        np.testing.assert_allclose(terms[f"consistency_{head}"].factor, share * 0.4 * ramp, rtol=1e-5)
    assert rows["label"].min() == IGNORE_LABEL
    late, _ = run(method, variables, batch, step=10)
    np.testing.assert_allclose(late["cross_sar"].factor, 0.6)


def _views(variables, batch, method):
    """Pseudo-labels (label, weight) of unlabelled rows by themselves, and their logits beside labelled rows."""
    from sarjax.models import build_network
    from sarjax.models.segmenters import resized

    network = build_network(SMALL, 3).clone(groups=((1, 2), (0,)))
    state = {"params": variables.params, "batch_stats": variables.stats}
    images = {k: network_inputs(batch[k], BOTH, DATA.spec, DATA.statistics) for k in ("labelled", UNLABELLED)}

    @jax.jit
    def views(x, present):
        found, _ = network.apply(state, x, True, present, method="views", mutable=["batch_stats"])
        return {head: resized(y, x.shape[1:3]) for head, y in found.logits.items()}

    def present(*streams):
        return {m: np.concatenate([seen_by(batch[k])[m].any((1, 2)) for k in streams]) for m in SENSORS}

    alone = {h: jax.nn.softmax(y) for h, y in views(images[UNLABELLED], present(UNLABELLED)).items()}
    where = seen_by(batch[UNLABELLED])
    labels = {}
    for head, p in alone.items():
        sure = np.asarray(p.max(-1) >= 0.4) & where[head]
        labels[head] = np.asarray(p.argmax(-1)), np.where(sure, p.max(-1), 0)
    n = len(images["labelled"])
    both = views(np.concatenate(list(images.values())), present("labelled", UNLABELLED))
    return labels, {head: y[n:] for head, y in both.items()}


def test_masked_pixels_are_the_mean_and_labels_come_from_the_whole_image():
    """What is hidden from a sensor does not reach its head, labelled rows are never masked."""
    method, variables, batch = build(**OFF | PLAIN | {"cross": 1.0, "cell": 16, "mask_sar": 0.0, "mask_optical": 1.0})
    other = {**batch[UNLABELLED]}
    other["optical"] = 255 - other["optical"]
    one, two = (run(method, variables, batch | {UNLABELLED: x})[0] for x in (batch[UNLABELLED], other))
    same(one["cross_entropy_optical"], two["cross_entropy_optical"])
    assert one["cross_sar"].total != two["cross_sar"].total, "optical's labels come from the image that is not masked"
    whole, _ = run(*build(**OFF | PLAIN | {"cross": 1.0}))
    assert one["cross_optical"].total != whole["cross_optical"].total


def test_complementary_loss_by_hand():
    r = np.random.default_rng(0)
    a, b = r.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    a[0, 0, 0] = b[0, 0, 0]
    where = r.random((2, 8, 8)) < 0.7
    where[:, :2, :2] = True
    p, q = (np.exp(x - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))) for x in (a, b))
    weight = 0.5 * np.abs(p - q).sum(-1) * where.reshape(2, 4, 2, 4, 2).mean((2, 4))
    expected = (weight * (q * np.log(q / p)).sum(-1)).sum(), weight.sum()
    np.testing.assert_allclose(jax.jit(complementary_loss)(a, b, where), expected, rtol=1e-5)
    total = jax.grad(lambda a, b: complementary_loss(a, b, where)[0], argnums=(0, 1))
    own, others = jax.jit(total)(a, b)
    assert own.any()
    assert not others.any(), "the other one teaches"
    # d is a weight, not something to make small: the gradient is that of the divergence alone.
    np.testing.assert_allclose(own, weight[..., None] * (p - q), atol=1e-6)
    np.testing.assert_array_equal(jax.jit(complementary_loss)(a, a, where)[0], 0)


def test_complementary_learning_reads_what_the_other_sees():
    method, variables, batch = build(**OFF | {"complementary": 0.8, "cell": 16})
    assert variables.memory == {}
    terms, _ = run(method, variables, batch, step=20)
    for m in SENSORS:
        np.testing.assert_allclose(terms[f"complementary_{m}"].factor, 0.4, rtol=1e-6)
    rows = batch[UNLABELLED]
    gone, _ = run(method, variables, batch | {UNLABELLED: rows | {"sar_valid": 0 * rows["sar_valid"]}}, step=20)
    assert gone["complementary_optical"].weight == gone["complementary_sar"].weight == 0, "no SAR to learn from"
    hidden, _ = run(*build(**OFF | {"complementary": 0.8, "cell": 16, "mask_optical": 1.0, "mask_sar": 0.0}))
    assert hidden["complementary_sar"].weight == 0, "nothing of the optical image is seen"
    assert hidden["complementary_optical"].weight > 0


def test_a_sensor_that_is_not_there_does_not_reach_the_fused_head():
    method, variables, batch = build()
    rows = batch["labelled"]
    variables = variables._replace(params=jax.tree.map(lambda p: p + 0.01, variables.params))
    for m, other in zip(SENSORS, SENSORS[::-1], strict=True):
        blind = rows | {f"{m}_valid": 0 * rows[f"{m}_valid"]}
        noise = np.random.default_rng(0).integers(0, 255, rows[m].shape).astype(rows[m].dtype)
        one, two = (outputs_of(method, variables, blind | {m: x}) for x in (rows[m], noise))
        same(one["fused"], two["fused"])
        whole = outputs_of(method, variables, rows)
        assert np.abs(one["fused"] - whole["fused"]).max() > 1e-3
        same(one[other], whole[other])
        alone = {k: rows[k] for k in method.heads[other].requires}
        np.testing.assert_array_equal(
            jax.jit(method.heads[other].predict)(variables.params, variables.stats, alone), whole[other]
        )
    forwarded = jax.jit(method.forward)(variables.params, variables.stats, rows)
    np.testing.assert_array_equal(forwarded.logits, outputs_of(method, variables, rows)["fused"])


def test_sensors_are_withheld_only_where_both_are_there():
    n = 4000
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(np.arange(n))
    there = {"sar": np.arange(n) % 4 > 0, "optical": np.arange(n) % 5 > 0}
    found = _withheld(there, keys, 0.3)
    both = there["sar"] & there["optical"]
    for m in SENSORS:
        assert not (found[m] & ~there[m]).any()
        same(found[m][~both], there[m][~both])
        np.testing.assert_allclose(1 - np.asarray(found[m])[both].mean(), 0.15, atol=0.02)
    assert (found["sar"] | found["optical"])[both].all()
    same(_withheld(there, keys, 0.0), there)


def test_memory_is_what_labelled_and_unlabelled_rows_say():
    """The queue moves with unlabelled rows, prototypes and frequencies with labelled ones."""
    method, variables, batch = build(momentum=0.0)
    after = run(method, variables, batch)[1].memory
    label = batch["labelled"]["label"]
    known = np.bincount(label[label < 3], minlength=3)
    np.testing.assert_allclose(after["frequencies"], known / known.sum(), rtol=1e-4)
    for head in HEADS:
        np.testing.assert_array_equal(after[f"seen/{head}"], known > 0)
        np.testing.assert_allclose(after[f"queue/{head}"][0].sum(), 1, rtol=1e-5)
        assert not after[f"queue/{head}"][1:].any()
    blind = batch["labelled"] | {"label": np.full_like(label, IGNORE_LABEL)}
    kept = run(method, variables, batch | {"labelled": blind})[1].memory
    for name in ("frequencies", *(f"{what}/{h}" for h in HEADS for what in ("prototypes", "seen"))):
        assert not kept[name].any()
    assert kept["filled"] == 1


def test_unlabelled_rows_without_data_give_nothing():
    method, variables, batch = build(region=True)
    rows = batch[UNLABELLED]
    empty = rows | {f"{m}_valid": 0 * rows[f"{m}_valid"] for m in SENSORS}
    terms, outputs = run(method, variables, batch | {UNLABELLED: empty})
    for name, term in terms.items():
        if not name.startswith("cross_entropy"):
            assert (term.total, term.weight) == (0, 0), name
    assert outputs.memory["filled"] == 0
    assert jax.tree.all(
        jax.tree.map(lambda g: np.isfinite(g).all(), gradient(method, variables, batch | {UNLABELLED: empty}))
    )


def test_pseudo_labels_of_a_report_are_those_of_inference():
    method, variables, batch = build(**PLAIN)
    rows = batch[UNLABELLED]
    found = jax.jit(method.pseudo)(variables.params, variables.stats, variables.memory, rows)
    for head, logits in outputs_of(method, variables, rows).items():
        np.testing.assert_array_equal(found[head].label, logits.argmax(-1))
        where = seen_by(rows)[head]
        np.testing.assert_allclose(found[head].weight, np.where(where, jax.nn.softmax(logits).max(-1), 0), rtol=1e-5)


@pytest.mark.parametrize("unlabelled", [1, 2])
def test_the_same_on_eight_devices(unlabelled):
    options = LabelReassignment(region=True, unlabelled=unlabelled)
    context = context_of(options, augment=Augment(flip=True, rotate=True))
    method = build_method(context)
    variables = jax.jit(method.init)(jax.random.key(0))
    batch = Batches(DATA.split("train"), method.streams, batch_size=8, seed=0, labelled=0.5)[0]
    results = []
    for mesh in (make_mesh(Mesh(data=1), jax.devices()[:1]), make_mesh(Mesh())):
        placed = put_batch(mesh, batch)
        rest = Rest(None, variables.stats, variables.memory)
        arguments = variables.params, rest, placed, KEY, jnp.int32(15)
        compiled = jax.jit(method.loss).lower(*arguments).compile()
        terms, outputs = compiled(*arguments)
        results.append(({k: (t.total, t.weight) for k, t in terms.items()}, outputs.memory, outputs.metrics))
    assert "all-reduce" in (program := compiled.as_text())
    assert not [moved for moved in ("all-gather", "all-to-all", "collective-permute") if moved in program]
    one, eight = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), one[1], eight[1])
    for name, (total, weight) in one[0].items():
        np.testing.assert_allclose(eight[0][name], (total, weight), rtol=2e-3, err_msg=name)


def test_a_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    """Prototypes, frequencies and queues go on where they were."""
    config = toy.config(LabelReassignment(), network=SMALL, inputs=BOTH, data=Data("toy", labelled=0.5), steps=4)
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, mesh=Mesh(data=1)))
    train = functools.partial(loop.train, config, dataset=DATA, say=lambda line: None)
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopFlag, "requested", lambda self, step: step == 3)
        assert int(train(tmp_path / "resumed").step) == 3
    resumed = train(tmp_path / "resumed")
    assert resumed.memory["filled"] == 4
    same(jax.device_get((whole.params, whole.stats, whole.memory)), (resumed.params, resumed.stats, resumed.memory))


def test_what_is_refused():
    for options, message in (
        ({"network": FCN(width=0.0625)}, "trains network 'dllr', not 'fcn'"),
        ({"inputs": Inputs(modalities=("sar",))}, "reads optical and sar, not sar"),
        ({"inputs": Inputs(modalities=("sar", "optical"), repeat=6)}, r"inputs\.repeat would mix"),
    ):
        with pytest.raises(UserError, match=message):
            build_method(context_of(LabelReassignment(), **options))
    for changed, message in (
        ({"mask_optical": 0.8, "mask_sar": 0.3}, "would hide some cells from both"),
        ({"iterations": 0}, r"method\.iterations is 0"),
        ({"relaxation": 0.0}, r"method\.relaxation is 0\.0"),
        ({"unlabelled": -1}, r"method\.unlabelled is -1"),
    ):
        with pytest.raises(UserError, match=message):
            build_method(context_of(LabelReassignment(**changed)))
