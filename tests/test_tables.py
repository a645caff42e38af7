"""What a table says of its runs: means, differences, orders; and what the published tables say."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import toy

from sarjax import config, experiments, recipes
from sarjax.config import Data, Inputs
from sarjax.errors import UserError
from sarjax.evaluate.average_precision import BINS
from sarjax.evaluate.bootstrap import Difference, paired_bootstrap
from sarjax.evaluate.evaluator import Evaluation
from sarjax.experiments import make_plan
from sarjax.options import LANet
from sarjax.recipes import tables
from sarjax.recipes.tables import TABLES, Row, Table, all_rows, on
from sarjax.reports import comparison, rows
from sarjax.reports.comparison import Result, compare, has_interval, metric_of
from sarjax.spec import ClassSpec

SPEC = dataclasses.replace(toy.SPEC, classes=(ClassSpec("a", (0, 0, 0)), ClassSpec("b", (1, 1, 1))), excluded=())


def result(*tiles):
    per_tile = {i: np.array([[a, b], [c, d]], np.int64) for i, (a, b, c, d) in enumerate(tiles)}
    return Result(Evaluation(np.sum(list(per_tile.values()), 0), per_tile), repr(tiles))


def accuracy(result):
    confusion = result.evaluation.confusion
    return np.trace(confusion) / confusion.sum()


def table(names, metrics=("pixel_accuracy",), **paper):
    return Table("t", "t", tuple(Row(n, n, paper.get(n, {})) for n in names), names[0], metrics, "s", "toy")


def test_mean_spread_and_delta_by_hand():
    results = {
        "none": {0: result((6, 4, 0, 0)), 1: result((7, 3, 0, 0)), 2: result((8, 2, 0, 0))},
        "full": {0: result((9, 1, 0, 0))},
    }
    t = table(("none", "full"), ("pixel_accuracy", "iou/b", "iou/c"), none={"pixel_accuracy": 0.65})
    found = compare(t, results, SPEC, True, {})
    cell = found["rows"]["none"]["pixel_accuracy"]
    assert cell["values"] == {"0": 0.6, "1": 0.7, "2": 0.8}
    assert cell["mean"] == pytest.approx(0.7)
    assert cell["sd"] == pytest.approx(0.1)
    assert cell["sd"] == pytest.approx(statistics.stdev([0.6, 0.7, 0.8]))
    assert cell["delta"] == pytest.approx(0.05)
    assert cell["minus_baseline"] is None
    cell = found["rows"]["full"]["pixel_accuracy"]
    assert (cell["n"], cell["sd"], cell["paper"], cell["delta"]) == (1, None, None, None)
    assert cell["minus_baseline"]["value"] == pytest.approx(0.3), "of the seed that both have"
    assert found["rows"]["none"]["iou/b"]["mean"] == 0
    assert found["rows"]["none"]["iou/c"] == {
        "values": {"0": None, "1": None, "2": None},
        "mean": None,
        "sd": None,
        "n": 0,
        "paper": None,
        "delta": None,
        "minus_baseline": None,
    }, "no such class"
    json.dumps(found, allow_nan=False)
    assert compare(t, results, SPEC, False, {})["rows"]["none"]["pixel_accuracy"]["delta"] is None
    with pytest.raises(UserError, match="did you mean 'miou'"):
        compare(table(("none",), ("mIoU",)), results, SPEC, True, {})


def test_intervals_are_of_how_they_were_made(monkeypatch):
    """The value is always the results' own; another way to resample makes other intervals."""
    runs = {"none": {0: result((6, 4, 0, 0), (1, 9, 0, 0))}, "full": {0: result((9, 1, 0, 0), (5, 5, 0, 0))}}

    def found(known):
        cell = compare(table(("none", "full")), runs, SPEC, True, known)["rows"]["full"]["pixel_accuracy"]
        return cell["minus_baseline"]

    many = np.random.default_rng(0).integers(0, 9, (2, 40, 4))
    wide = {row: {0: result(*map(tuple, tiles))} for row, tiles in zip(runs, many, strict=True)}
    cell = compare(table(("none", "full")), wide, SPEC, True, {})["rows"]["full"]["pixel_accuracy"]["minus_baseline"]
    ours, theirs = ([wide[row][0].evaluation.per_tile] for row in ("full", "none"))
    expected = paired_bootstrap(ours, theirs, lambda m: np.trace(m) / m.sum())
    assert [cell[k] for k in ("value", "low", "high")] == pytest.approx(list(expected)), "95 % by 2,000 resamples"

    known = {}
    first = found(known)
    known = {key: [-1.0, 1.0] for key in known}
    second = found(known)
    assert first["value"] == second["value"] == pytest.approx(0.35)
    assert (second["low"], second["high"]) == (-1.0, 1.0), "looked up"
    monkeypatch.setitem(comparison.RESAMPLING, "percentiles", (40.0, 60.0))
    third = found(known)
    assert first["low"] <= third["low"] <= third["high"] <= first["high"]
    monkeypatch.setitem(comparison.RESAMPLING, "resamples", 3)
    found(known)
    monkeypatch.setattr(comparison.bootstrap, "VERSION", -1)
    found(known)
    assert len(known) == 4


def test_the_bootstrap_gets_pairs(monkeypatch):
    """Seeds that both rows have, in one order on both sides; each side {tile: matrix} by run."""
    calls = []

    def bootstrap(a, b, metric, **how):
        calls.append((a, b, metric(np.array([[3, 1], [0, 0]]))))
        assert how == comparison.RESAMPLING
        return Difference(0.5, -0.25, float("nan"))

    monkeypatch.setattr(comparison.bootstrap, "paired_bootstrap", bootstrap)
    runs = {row: {s: result((s, k, 0, 1), (1, 2, 3, 4 + s)) for s in seeds} for row, seeds, k in
            (("none", (2, 0, 1), 1), ("full", (1, 2, 5), 2))}  # fmt: skip
    known = {}
    for _ in range(2):
        found = compare(table(("none", "full")), runs, SPEC, True, known)
    ((a, b, value),) = calls
    assert value == 0.75
    assert len(known) == 1, "an interval is computed once"
    for side, row in ((a, "full"), (b, "none")):
        assert [run is runs[row][seed].evaluation.per_tile for run, seed in zip(side, (1, 2), strict=True)] == [
            True
        ] * 2
    ours, theirs = ([accuracy(runs[row][seed]) for seed in (1, 2)] for row in ("full", "none"))
    assert found["rows"]["full"]["pixel_accuracy"]["minus_baseline"] == {
        "value": pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs)),
        "low": -0.25,
        "high": None,
        "seeds": [1, 2],
    }
    runs["full"][1] = result((9, 9, 9, 9), (1, 1, 1, 1))
    compare(table(("none", "full")), runs, SPEC, True, known)
    assert len(calls) == 2, "other results, another interval"


def test_average_precision_has_a_mean_and_a_spread_but_no_interval():
    def scored(low, seed=0):
        """Class b: 4 of 10 pixels, of which `low` score below everything else."""
        r = result((6 - seed, seed, 1, 3))
        scores = np.array([[[0, 1, 3], [2, 4, 0]], [[0, 6, 0], [low, 0, 4 - low]]], np.int64)
        return Result(dataclasses.replace(r.evaluation, scores=scores), f"{low}-{seed}")

    def b(low):
        return ((4 - low) + low * 0.4) / 4

    old = result((5, 1, 1, 3))
    runs = {"none": {0: scored(4), 1: scored(2)}, "full": {0: scored(1), 1: scored(0)}, "old": {0: old}}
    t = table(tuple(runs), ("pixel_accuracy", "ap/b", "map", "ap/c"), none={"ap/b": 0.5}, full={"ap/b": 0.9})
    known = {}
    found = compare(t, runs, SPEC, True, known)
    assert compare(t, runs, SPEC, True, known) == found
    json.dumps(found, allow_nan=False)
    cell = found["rows"]["full"]["ap/b"]
    assert cell["mean"] == pytest.approx((b(1) + b(0)) / 2)
    assert cell["sd"] == pytest.approx(statistics.stdev([b(1), b(0)]))
    assert cell["delta"] == pytest.approx(cell["mean"] - 0.9)
    difference = cell["minus_baseline"]
    assert difference["value"] == pytest.approx((b(1) + b(0) - b(4) - b(2)) / 2)
    assert (difference["low"], difference["high"], difference["seeds"]) == (None, None, [0, 1])
    assert found["rows"]["full"]["pixel_accuracy"]["minus_baseline"]["low"] is not None
    a = (2 * 6 / 10 + 4 * 4 / 8) / 6
    assert found["rows"]["full"]["map"]["values"]["0"] == pytest.approx((a + b(1)) / 2)
    assert found["rows"]["full"]["ap/c"]["mean"] is None, "no such class"
    assert found["rows"]["old"]["map"]["mean"] is None, "evaluated before there were scores"
    assert found["rows"]["old"]["map"]["minus_baseline"] is None
    mixed = {"none": {0: old}, "full": {0: scored(1)}}
    assert compare(t, mixed, SPEC, True, {})["rows"]["full"]["map"]["minus_baseline"]["value"] is None
    about = {"metrics": t.metrics, "same_data": True, "figures_of": "toy", "baseline": "none"}
    lines = list(comparison._split_lines(about, "val", found))
    minus = lines[lines.index("Minus `none`:") :]
    (full,) = (line for line in minus if line.startswith("| full"))
    assert f"| {difference['value']:+.4f} [-] |" in full
    assert full.endswith("| - |")


def test_metrics_are_those_that_a_logger_plots():
    rng = np.random.default_rng(0)
    per_tile = {i: rng.integers(0, 50, (3, 3)) for i in range(5)}
    evaluation = Evaluation(sum(per_tile.values()), per_tile, rng.integers(0, 9, (3, 2, BINS)))
    for name, value in evaluation.scalars(toy.SPEC).items():
        assert metric_of(name, toy.SPEC)(evaluation) == pytest.approx(value), name
        assert has_interval(name) == (name != "map" and not name.startswith(("ap/", "tile_mean_")))
    assert np.isnan(metric_of("tile_mean_iou/sea", toy.SPEC)(evaluation))


def test_orders_are_computed():
    runs = {n: {0: result((v, 10 - v, 0, 0))} for n, v in (("none", 4), ("one", 7), ("two", 6), ("all", 6), ("new", 9))}
    paper = {n: {"pixel_accuracy": v} for n, v in (("none", 0.1), ("one", 0.2), ("two", 0.3), ("all", 0.3))}
    paper["unseen"] = {"pixel_accuracy": 0.9}
    (order,) = compare(table(("none", "one", "two", "all", "new", "unseen"), **paper), runs, SPEC, True, {})["orders"]
    assert order == {
        "metric": "pixel_accuracy",
        "paper": "none < one < two = all",
        "seen": "none < two = all < one",
        "pairs": 5,
        "pairs_in_the_papers_order": 3,
    }
    assert compare(table(("none", "one")), runs, SPEC, True, {})["orders"] == [], "nothing is printed"


def test_what_a_row_is_about():
    lanet, pspnet, wide = recipes.find("cheng_lanet"), recipes.find("cheng_pspnet"), recipes.find("ombria_s1_plain")
    assert rows.differs(lanet, lanet) == []
    assert rows.differs(lanet, pspnet) == ["network.name: 'lanet' -> 'pspnet'"]
    assert "epochs: 50.0 -> 120.0" in rows.differs(lanet, wide)


PUBLISHED = [
    (paper, data, preset)
    for paper in TABLES
    for data in tables.reached(recipes.find(TABLES[paper][0].rows[0].recipe))
    for preset in ("", *tables.PRESETS)
]


@pytest.mark.parametrize(("paper", "data", "preset"), PUBLISHED)
def test_rows_on_any_data(paper, data, preset):
    """All rows of a paper are trained alike: they differ in network, method, sensors and labels alone."""
    found = {}
    for name, row in all_rows(TABLES[paper]).items():
        if row.recipe in recipes.RECIPES:
            found[name] = on(recipes.find(row.recipe), data, preset)
            config.validate(found[name])
    steps = {round(c.experiment.epochs * c.experiment.data.labelled, 6) for c in found.values()}
    assert len(steps) == 1, "as many steps, however few tiles are labelled"
    differs = ("network.", "method.", "inputs.", "data.labelled:", "epochs:")
    for table in TABLES[paper]:
        for row in table.rows:
            if row.name in found and table.baseline in found:
                for line in config.difference(found[table.baseline].experiment, found[row.name].experiment):
                    assert line.startswith(differs), line


def test_where_data_and_preset_put_a_row():
    lanet = recipes.find("cheng_lanet")
    assert on(lanet, "whu_opt_sar").experiment == lanet.experiment
    flood, like = on(lanet, "ombria", "cpu"), recipes.find("ombria_s1", "cpu").experiment
    e = flood.experiment
    assert flood.recipe == "cheng_lanet+ombria+cpu"
    assert (e.data, e.inputs, e.optimizer, e.batch_size, e.epochs) == (
        *(like.data, like.inputs, like.optimizer, like.batch_size, like.epochs),
    )
    assert e.network == LANet(width=0.25)
    assert e.augment.crop == 128
    assert e.method == lanet.experiment.method
    e, like = on(lanet, "synthetic").experiment, recipes.find("synthetic_sar").experiment
    assert (e.data, e.inputs, e.network) == (lanet.experiment.data, lanet.experiment.inputs, LANet())
    assert (e.optimizer, e.augment, e.batch_size, e.epochs) == (like.optimizer, like.augment, 8, 60)
    optical = dataclasses.replace(
        lanet, experiment=dataclasses.replace(lanet.experiment, inputs=Inputs(modalities=("optical",)))
    )
    assert on(optical, "ombria").experiment.inputs == recipes.find("ombria_s2").experiment.inputs
    both = on(recipes.find("dhfa_teacher_both"), "ombria").experiment.inputs
    assert both == dataclasses.replace(recipes.find("ombria_s1").experiment.inputs, modalities=("sar", "optical"))
    few = on(recipes.find("dhfa_few_student"), "ombria", "cpu").experiment
    assert (few.data, few.epochs) == (Data("ombria", labelled=1 / 8), 320.0)
    plan = make_plan("cheng", Path("w"), data="ombria", epochs=3.0)
    assert plan.config(plan.rows["lanet"], 4).experiment.epochs == 3.0
    assert plan.config(plan.rows["lanet"], 4).experiment.seed == 4
    plan = make_plan("dhfa", Path("w"), data="ombria", epochs=3.0)
    assert plan.config(plan.rows["alone"]).experiment.epochs == 3.0
    assert plan.config(plan.rows["few_alone"]).experiment.epochs == 24.0, "as many steps on an eighth of the labels"
    assert plan.config(plan.rows["few_alone"], 2).experiment.data.labelled_seed == 0


def test_where_a_row_of_change_is_put():
    """From LEVIR-CD to sets of its family, to floods and to made-up scenes, which SAR sees at both dates."""
    alone = recipes.find("frd_alone")
    assert {tables.home(recipes.find(r.recipe)) for t in TABLES["frd"] for r in t.rows} == {"levir_cd"}
    assert on(alone, "levir_cd").experiment == alone.experiment
    assert on(alone, "sysu_cd").experiment.data == Data("bitemporal", "sysu_cd")
    assert on(alone, "sysu_cd").experiment.optimizer == alone.experiment.optimizer
    flood, like = on(alone, "ombria").experiment, recipes.find("ombria_s1").experiment
    assert flood.inputs == dataclasses.replace(like.inputs, date_difference=False, by_date=True)
    assert (flood.data, flood.augment, flood.epochs) == (like.data, like.augment, 120)
    assert not flood.augment.swap_dates, "a flood has a before and an after"
    assert (alone.experiment.network.difference, flood.network.difference) == ("absolute", "signed")
    assert on(recipes.find("frd_fc_siam_diff"), "ombria").experiment.network.NAME == "fc_siam_diff"
    made = on(alone, "synthetic").experiment
    assert made.data == Data("bitemporal", "synthetic")
    assert made.inputs == Inputs(modalities=("sar",), local_mean=7, by_date=True)
    for recipe, data in (("frd_alone", "whu_opt_sar"), ("cheng_lanet", "levir_cd")):
        with pytest.raises(UserError, match=f"cannot be put on {data}"):
            on(recipes.find(recipe), data)
    assert make_plan("frd", Path("w")).data == "levir_cd", "a paper's own"
    assert make_plan("cheng", Path("w")).data == "whu_opt_sar"
    with pytest.raises(UserError, match="cannot be put on sysu_cd"):
        make_plan("cheng", Path("w"), data="sysu_cd")
    for data, changed in (("levir_cd", "changed"), ("synthetic", "changed"), ("ombria", "flood")):
        shown = make_plan("frd", Path("w"), data=data).tables[0].metrics
        of_change = [f"{m}/{changed}" for m in ("f1", "iou", "precision", "recall", "ap", "tile_mean_iou")]
        assert list(shown) == [*of_change, "pixel_accuracy", "kappa"]


def test_rows_of_few_labels_by_another_share_and_draw():
    plans = [make_plan("dllr", Path("w"), data="ombria", labelled=share) for share in (0.0, 1 / 32)]
    own, other = ([plan.config(plan.rows[name], 2).experiment for name in ("full", "all_labels")] for plan in plans)
    assert [e.data.labelled for e in own] == [1 / 16, 1.0]
    assert [e.data.labelled for e in other] == [1 / 32, 1.0]
    assert [e.epochs * e.data.labelled for e in own] == [e.epochs * e.data.labelled for e in other] == [120.0, 120.0]
    assert [e.data.labelled_seed for e in other] == [2, 0]
    short = make_plan("dllr", Path("w"), data="ombria", labelled=1 / 32, epochs=2.0)
    assert short.config(short.rows["full"]).experiment.epochs == 64.0
    for share in (1.0, -0.5):
        with pytest.raises(UserError, match="should be a share between 0 and 1"):
            make_plan("dllr", Path("w"), data="ombria", labelled=share)


def test_the_published_tables_hold_together():
    for paper, found in TABLES.items():
        assert all_rows(found)
        assert paper not in Path(experiments.__file__).read_text(encoding="utf-8"), "a paper is named in general code"
        for table in found:
            for row in table.rows:
                assert set(row.paper) <= set(table.metrics)
                if "macro_f1" in row.paper and (table.name, row.name) != ("table1", "both"):
                    p, r, f1 = (row.paper.get(f"macro_{m}", 1.0) for m in ("precision", "recall", "f1"))
                    assert f1 <= 2 * p * r / (p + r), "a mean of F1 is below that of the means"
            assert bool(table.source) == any(row.paper for row in table.rows)
    table1, table3, ours = TABLES["cheng"]
    assert ".6527" in table1.note
    shared = {row.name: row for row in table3.rows}
    assert {row.name for row in table1.rows} & shared.keys() == {"lanet", "both"}
    rows = all_rows(TABLES["cheng"])
    assert len(rows) == 10
    assert [row.name for row in ours.rows][:2] == ["lanet", "both"]
    assert [row.name for row in rows.values() if row.test] == ["lanet", "both"]


@pytest.mark.parametrize(
    ("rows", "baseline", "message"),
    [
        ((Row("a", "x", {}, teacher="a"),), "a", "its own teacher"),
        ((Row("a", "x", {}, teacher="b"), Row("b", "x", {}, teacher="a")), "a", "its own teacher"),
        ((Row("a", "x", {}, teacher="c"),), "a", "is no row"),
        ((Row("a", "x", {}), Row("a", "y", {})), "a", "is x and y"),
        ((Row("a", "x", {}),), "b", "none of its rows"),
    ],
)
def test_tables_that_make_no_sense(rows, baseline, message):
    with pytest.raises(ValueError, match=message):
        all_rows((Table("t", "t", rows, baseline, (), ""),))
