"""Counts are exact: against a plain count, past float32, with padding, ignored labels, and on many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import scored

from sarjax.evaluate import confusion
from sarjax.evaluate.confusion import confusion_matrix, confusion_per_row
from sarjax.train.collectives import collectives, totals

K = 5


def plain_count(prediction, label, row_valid):
    out = np.zeros((len(label), K, K), np.int64)
    for at in np.ndindex(label.shape):
        if row_valid[at[0]] and label[at] < K:
            out[at[0], label[at], prediction[at]] += 1
    return out


@pytest.mark.parametrize("size", [(12, 9), (1, 1), (7, 130)])
def test_against_a_plain_count(size):
    logits, label, row_valid = scored(8, *size)
    expected = plain_count(logits.argmax(-1), label, row_valid)
    rows = jax.jit(confusion_per_row, static_argnums=3)(logits, label, row_valid, K)
    assert rows.dtype == jnp.int32
    assert np.array_equal(rows, expected)
    assert not rows[1].any()
    assert not rows[2].any()
    for prediction in (logits, logits.argmax(-1).astype(np.uint8)):
        assert np.array_equal(confusion_matrix(prediction, label, row_valid, K), expected.sum(0))


def test_what_is_no_class_is_left_out():
    logits, label, row_valid = scored()
    prediction = logits.argmax(-1).astype(np.int32)
    wanted = np.asarray(confusion_per_row(prediction, np.where(label < 2, label, 255), row_valid, K))
    stray = np.where(label < 2, prediction, np.where(label % 2, -1, K))
    assert np.array_equal(confusion_per_row(stray, label, row_valid, K), wanted)


@pytest.mark.parametrize("size", [(12, 9), (3, 700)])
def test_products_count_the_same(monkeypatch, size):
    logits, label, row_valid = scored(8, *size)
    counted = confusion_per_row(logits, label, row_valid, K)
    monkeypatch.setattr(confusion, "by_scatter", confusion.by_products)
    assert np.array_equal(confusion_per_row(logits, label, row_valid, K), counted)


def test_no_padding_without_row_valid():
    logits, label, _ = scored()
    everything = confusion_matrix(logits, label, np.ones(8), K)
    assert np.array_equal(confusion_matrix(logits, label, None, K), everything)


def test_another_ignore_label():
    logits, label, row_valid = scored()
    got = confusion_matrix(logits, label, row_valid, K, ignore_label=0)
    assert not got[0].any()
    assert np.array_equal(got[1:], confusion_matrix(logits, label, row_valid, K)[1:])


def test_exact_where_float32_stops_counting():
    """2^24 + 1 pixels of one class: a float32 sum of ones gets stuck at 2^24."""
    h, w = 4097, 4096
    label = jnp.zeros((1, h, w), jnp.uint8)
    prediction = jnp.zeros((1, h, w), jnp.uint8).at[0, 0, 0].set(1)
    rows = jax.jit(confusion_per_row, static_argnums=3)(prediction, label, None, 2)
    assert np.array_equal(rows[0], [[h * w - 1, 1], [0, 0]])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_sharded_batches_give_the_same(shape):
    mesh = jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto,) * 2)
    logits, label, row_valid = scored()
    rows = NamedSharding(mesh, P("data", "space"))
    placed = jax.device_put((logits, label), rows), jax.device_put(row_valid, NamedSharding(mesh, P("data")))
    f = jax.jit(confusion_per_row, static_argnums=3, out_shardings=NamedSharding(mesh, P()))
    out = f(*placed[0], placed[1], K)
    assert out.is_fully_replicated
    program = f.lower(*placed[0], placed[1], K).compile().as_text()
    assert set(totals(collectives(program))) == {"all-reduce"}, "pixels are not sent anywhere, counts are"
    assert np.array_equal(out, plain_count(logits.argmax(-1), label, row_valid))
