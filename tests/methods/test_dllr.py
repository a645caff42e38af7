"""DLLR's method as a whole: its heads, its runs, any number of devices, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from methods.toy_dllr import (
    BOTH,
    DATA,
    KEY,
    PLAIN,
    SMALL,
    build,
    context_of,
    outputs_of,
    run,
    same,
    seen_by,
)

from sarjax.config import Augment, Data, Inputs, Mesh
from sarjax.data.pipeline import Batches
from sarjax.errors import UserError
from sarjax.methods import build_method
from sarjax.methods.dllr import HEADS, LARGEST_ERROR, SENSORS, UNLABELLED
from sarjax.methods.record import Rest
from sarjax.options import FCN, LabelReassignment
from sarjax.spec import IGNORE_LABEL
from sarjax.train import loop
from sarjax.train.collectives import collectives, totals
from sarjax.train.mesh import make_mesh, put_batch


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
    assert method.limits["transport_error"][0] == LARGEST_ERROR == 1e-2


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


def test_pseudo_labels_of_a_report_are_those_of_inference():
    method, variables, batch = build(**PLAIN)
    rows = batch[UNLABELLED]
    found = jax.jit(method.pseudo)(variables.params, variables.stats, variables.memory, rows)
    for head, logits in outputs_of(method, variables, rows).items():
        np.testing.assert_array_equal(found[head].label, logits.argmax(-1))
        where = seen_by(rows)[head]
        np.testing.assert_allclose(found[head].weight, np.where(where, jax.nn.softmax(logits).max(-1), 0), rtol=1e-5)


def test_eight_devices_gather_nothing():
    """Neither pixels for transport nor where rows lie; what they come to is in train/test_layouts.py."""
    options = LabelReassignment(region=True, unlabelled=2)
    method = build_method(context_of(options, augment=Augment(flip=True, rotate=True)))
    variables = jax.jit(method.init)(jax.random.key(0))
    batch = Batches(DATA.split("train"), method.streams, batch_size=8, seed=0, labelled=0.5)[0]
    rest = Rest(None, variables.stats, variables.memory)
    arguments = variables.params, rest, put_batch(make_mesh(Mesh()), batch), KEY, jnp.int32(15)
    compiled = jax.jit(method.loss).lower(*arguments).compile()
    assert set(totals(collectives(compiled.as_text()))) == {"all-reduce"}


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
    with pytest.raises(UserError, match="'histogram' counts the labels of all training tiles"):
        build_method(context_of(LabelReassignment(class_weights="histogram")))
    for changed, message in (
        ({"mask_optical": 0.8, "mask_sar": 0.3}, "would hide some cells from both"),
        ({"iterations": 0}, r"method\.iterations is 0"),
        ({"relaxation": 0.0}, r"method\.relaxation is 0\.0"),
        ({"unlabelled": -1}, r"method\.unlabelled is -1"),
    ):
        with pytest.raises(UserError, match=message):
            build_method(context_of(LabelReassignment(**changed)))
