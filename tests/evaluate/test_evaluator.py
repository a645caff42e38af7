"""The evaluator pools exactly, keeps every tile, and leaves padding out."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sarjax.evaluate.average_precision import average_precision, score_histogram
from sarjax.evaluate.evaluator import Counts, Evaluation, evaluate, make_count_step
from sarjax.evaluate.metrics import metrics
from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

SPEC = DatasetSpec(
    "toy",
    (ModalitySpec("sar", (BandSpec("VV", "db"),)),),
    tuple(ClassSpec(n, (i, i, i)) for i, n in enumerate(("dry", "flood", "other"))),
    excluded=("other",),
)


def make_batches(tiles=11, rows=4, h=8, w=6):
    """Three batches, the last padded with copies of a real tile; tile 5 is ignored as a whole."""
    r = np.random.default_rng(0)
    label = r.choice([0, 1, 2, 255], (tiles, h, w), p=[0.6, 0.2, 0.1, 0.1]).astype(np.uint8)
    label[5] = 255
    image = r.standard_normal((tiles, h, w, 3)).astype(np.float32)
    for first in range(0, tiles, rows):
        at = np.minimum(np.arange(first, first + rows), tiles - 1)
        yield {
            "sar": image[at],
            "label": label[at],
            "id": (at + 1000).astype(np.int32),
            "row_valid": (np.arange(first, first + rows) < tiles).astype(np.uint8),
        }


def predict(params, stats, batch):
    return batch["sar"] @ params + stats


PARAMS, STATS = np.eye(3, dtype=np.float32), np.array([0.5, 0, 0], np.float32)
COUNT = jax.jit(make_count_step(predict, 3))


def expected():
    per_tile = {}
    for batch in make_batches():
        prediction = np.asarray(predict(PARAMS, STATS, batch)).argmax(-1)
        for i in range(4):
            if batch["row_valid"][i]:
                keep = batch["label"][i] < 3
                cm = np.zeros((3, 3), np.int64)
                np.add.at(cm, (batch["label"][i][keep], prediction[i][keep]), 1)
                per_tile[int(batch["id"][i])] = cm
    return per_tile


def expected_scores():
    scores = 0
    for batch in make_batches():
        label = np.where((batch["row_valid"] > 0)[:, None, None], batch["label"], 255)
        scores = scores + np.asarray(score_histogram(predict(PARAMS, STATS, batch), label), np.int64)
    return scores


def check(evaluation):
    wanted = expected()
    assert list(evaluation.per_tile) == list(wanted)
    assert all(np.array_equal(evaluation.per_tile[tile], wanted[tile]) for tile in wanted)
    assert evaluation.confusion.dtype == evaluation.scores.dtype == np.int64
    assert np.array_equal(evaluation.confusion, sum(wanted.values()))
    assert np.array_equal(evaluation.scores, expected_scores())


def test_pooled_and_per_tile():
    evaluation = evaluate(partial(COUNT, PARAMS, STATS), make_batches())
    check(evaluation)
    assert len(evaluation.per_tile) == 11
    assert not evaluation.per_tile[1005].any()
    assert np.array_equal(evaluation.scores[:, 1].sum(-1), evaluation.confusion.sum(1)), "the same pixels"
    assert (evaluation.scores.sum((1, 2)) == evaluation.confusion.sum()).all()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_on_devices():
    mesh = jax.make_mesh((4, 2), ("data", "space"), axis_types=(AxisType.Auto,) * 2)

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, P("data", "space") if x.ndim > 1 else P("data")))

    count = jax.jit(make_count_step(predict, 3), out_shardings=NamedSharding(mesh, P()))
    check(evaluate(partial(count, PARAMS, STATS), ({k: put(v) for k, v in b.items()} for b in make_batches())))


def test_sums_pass_the_range_of_int32():
    big = Counts(np.full((1, 2, 2), 2**30, np.int32), np.full((2, 2, 3), 2**30, np.int32))
    for ids in (range(5), [0] * 5):
        evaluation = evaluate(lambda batch: big, [{"id": np.array([i])} for i in ids])
        assert np.array_equal(evaluation.confusion, np.full((2, 2), 5 * 2**30))
        assert np.array_equal(sum(evaluation.per_tile.values()), evaluation.confusion)
        assert np.array_equal(evaluation.scores, np.full((2, 2, 3), 5 * 2**30))


def test_rows_of_one_tile_add_up():
    batches = [{"id": np.array([7, 7])}, {"id": np.array([7, 8])}]
    evaluation = evaluate(lambda batch: Counts(np.ones((2, 2, 2), np.int32)), batches)
    assert {k: v.sum() for k, v in evaluation.per_tile.items()} == {7: 12, 8: 4}


def test_padding_alone_and_nothing_at_all():
    only = {"id": np.array([0]), "row_valid": np.array([0])}
    evaluation = evaluate(lambda batch: Counts(np.zeros((1, 3, 3), np.int32)), [only])
    assert evaluation.per_tile == {}
    assert not evaluation.confusion.any()
    assert np.isnan(evaluation.scalars(SPEC)["miou"])
    assert evaluation.scores is None
    assert np.isnan(evaluation.scalars(SPEC)["map"])
    with pytest.raises(ValueError, match="no batches"):
        evaluate(lambda batch: None, [])


def test_metrics_follow_the_data_set():
    evaluation = Evaluation(sum(expected().values()), expected(), expected_scores())
    m = evaluation.metrics(SPEC)
    assert m.macro["iou"] == pytest.approx(np.mean(m.iou[:2]))
    assert m.macro["iou"] != metrics(evaluation.confusion).macro["iou"]
    scalars = evaluation.scalars(SPEC)
    tiles = evaluation.tile_mean()
    assert scalars["miou"] == m.macro["iou"]
    assert scalars["pixel_accuracy"] == m.oa
    assert scalars["iou/flood"] == m.iou[1]
    assert scalars["tile_mean_iou/flood"] == tiles.iou[1] != m.iou[1]
    ap = average_precision(evaluation.scores)
    assert scalars["ap/flood"] == ap[1]
    assert scalars["map"] == pytest.approx(ap[:2].mean())
    assert scalars["map"] != pytest.approx(ap.mean())
    assert all(isinstance(v, float) for v in scalars.values())
    assert tiles.tiles.max() == 10


def test_a_class_that_no_pixel_is_of_has_no_average_precision():
    scores = expected_scores()
    scores[1, 1] = 0
    evaluation = Evaluation(sum(expected().values()), expected(), scores)
    scalars = evaluation.scalars(SPEC)
    assert np.isnan(scalars["ap/flood"])
    assert scalars["map"] == scalars["ap/dry"] > 0
    nothing = Evaluation(evaluation.confusion, expected()).scalars(SPEC)
    assert np.isnan([nothing[k] for k in ("map", "ap/dry", "ap/flood", "ap/other")]).all(), "not counted"
    assert nothing["miou"] == scalars["miou"]
