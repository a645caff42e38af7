"""The first method: its terms, its switches both ways, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sarjax.config import Augment, Data, Inputs
from sarjax.errors import UserError
from sarjax.methods import build_method
from sarjax.methods.record import Context, Rest, Schedule
from sarjax.options import LANet, Supervised

DATA = toy.dataset(size=64)


def build(options=None, **changes):
    changes = {"augment": Augment(flip=False, rotate=False)} | changes
    experiment = toy.config(options or Supervised(), **changes).experiment
    method = build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
    return method, jax.jit(method.init)(jax.random.key(0))


def batch(rows=4, **replace):
    tiles = DATA.split("train")[:rows]
    stacked = {k: np.stack([t[k] for t in tiles]) for k in tiles[0]}
    return {"labelled": stacked | {"row": np.arange(rows, dtype=np.int32)} | replace}


def terms(method, variables, rows):
    rest = Rest(None, variables.stats, variables.memory)
    return jax.jit(method.loss)(variables.params, rest, rows, jax.random.key(1), jnp.zeros((), jnp.int32))


def test_cross_entropy_is_the_mean_over_valid_pixels():
    method, variables = build()
    rows = batch()
    found, outputs = terms(method, variables, rows)
    assert set(found) == {"cross_entropy"}
    assert float(found["cross_entropy"].weight) == (rows["labelled"]["label"] != 255).sum()
    assert 0 <= float(outputs.metrics["pixel_accuracy"].mean()) <= 1
    changed = [
        a
        for a, b in zip(jax.tree.leaves(outputs.stats), jax.tree.leaves(variables.stats), strict=True)
        if (a != b).any()
    ]
    assert changed, "batch-norm's running statistics move"


def test_switches_add_their_terms():
    method, variables = build(Supervised(dice=0.5, auxiliary=0.25), network=LANet(width=0.0625))
    found, _ = terms(method, variables, batch())
    assert {name: float(t.factor) for name, t in found.items()} == {
        "cross_entropy": 1.0,
        "dice": 0.5,
        "auxiliary": 0.25,
    }
    assert method.couples == ("batch-norm", "Dice")
    assert build()[0].couples == ("batch-norm",)


def test_nothing_labelled_is_zero_not_nan():
    method, variables = build(Supervised(dice=1.0))
    found, _ = terms(method, variables, batch(label=np.full((4, 64, 64), 255, np.uint8)))
    assert [float(t.mean()) for t in found.values()] == [0.0, 0.0]


WEIGHTED = {"histogram": Supervised(class_weights="histogram"), "given": Supervised(0.0, 0.0, "given", (1.0, 5.0, 1.0))}


@pytest.mark.parametrize("options", WEIGHTED.values(), ids=WEIGHTED)
def test_class_weights_change_the_loss(options):
    method, variables = build(options)
    plain, _ = build()
    weighted, flat = (terms(m, variables, batch())[0]["cross_entropy"] for m in (method, plain))
    assert abs(float(weighted.mean()) - float(flat.mean())) > 1e-4


def test_augmentation_follows_the_row_not_its_place():
    """A row is augmented by its index in the global batch, so any part of the batch draws the same."""
    method, variables = build(augment=Augment(crop=32, flip=True, rotate=True))
    whole = batch(4)["labelled"]
    weights = [
        float(terms(method, variables, {"labelled": {k: v[part] for k, v in whole.items()}})[0]["cross_entropy"].weight)
        for part in (np.s_[:], np.s_[:2], np.s_[2:])
    ]
    assert weights[0] == weights[1] + weights[2] > 0


def test_hidden_labels_are_not_learnt_from():
    """Noise in the truth that a run may not see leaves its gradient as it was, bit for bit."""
    method, variables = build(Supervised(dice=1.0), augment=Augment(crop=32, flip=True, rotate=True))
    rest = Rest(None, variables.stats, variables.memory)

    @jax.jit
    def gradient(rows):
        def value(params):
            found, _ = method.loss(params, rest, rows, jax.random.key(1), jnp.zeros((), jnp.int32))
            return sum(t.factor * t.mean() for t in found.values())

        return jax.grad(value)(variables.params)

    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 3, (4, 64, 64)).astype(np.uint8) for _ in range(2)]
    a, b = (gradient(batch(hidden_label=n)) for n in noise)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_encode_gives_features_by_stride():
    method, variables = build(network=LANet(width=0.0625))
    images = jnp.zeros((2, 64, 64, 1))
    for train in (False, True):
        features = method.encode(variables.params, variables.stats, images, train)
        assert {s: f.shape[1:3] for s, f in features.items() if s in (4, 16)} == {4: (16, 16), 16: (4, 4)}


def test_predict_sees_its_modalities_only():
    method, variables = build(inputs=Inputs(modalities=("optical",)))
    head = method.heads["main"]
    assert head.requires == ("optical", "optical_valid")
    assert method.requires == ("optical", "optical_valid", "label")
    rows = {k: v for k, v in batch()["labelled"].items() if k in head.requires}
    logits = head.predict(variables.params, variables.stats, rows)
    assert logits.shape == (4, 64, 64, 3)
    assert logits.dtype == jnp.float32


def test_a_histogram_of_labels_that_may_not_be_used_is_refused():
    options = Supervised(class_weights="histogram")
    experiment = toy.config(options, data=Data("toy", labelled=0.5)).experiment
    with pytest.raises(UserError, match=r"of which only experiment.data.labelled = 0\.5 may be used"):
        build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="has 2 values; data set 'toy' has 3 classes: land, water, absent"):
        build(Supervised(class_weights="given", class_weight_values=(1.0, 2.0)))
    method, variables = build(Supervised(auxiliary=1.0))
    with pytest.raises(UserError, match="'fcn' has no auxiliary head"):
        terms(method, variables, batch())
    experiment = dataclasses.replace(toy.config(Supervised()).experiment, inputs=Inputs(modalities=("radar",)))
    with pytest.raises(UserError, match="radar"):
        build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
