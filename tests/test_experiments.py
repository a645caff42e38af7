"""Tables at toy size: runs, skips, goes on, aggregates, compares; and what the published tables say."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
from pathlib import Path

import fake_data
import jax
import numpy as np
import pytest
import toy

from sarjax import cli, config, experiments, recipes
from sarjax.cli import common
from sarjax.config import Config, Data, Experiment, Inputs, Mesh
from sarjax.data.build import build
from sarjax.errors import UserError
from sarjax.evaluate.bootstrap import Difference
from sarjax.evaluate.evaluator import Evaluation
from sarjax.experiments import make_plan, reproduce
from sarjax.options import FCN, LANet
from sarjax.recipes import tables
from sarjax.recipes.tables import TABLES, Row, Table, all_rows, on
from sarjax.reports import comparison, rows
from sarjax.reports.comparison import Result, compare, markdown
from sarjax.spec import ClassSpec

TWO = (
    Table(
        name="first",
        title="loss",
        rows=(
            Row("dice", "ombria_s1", {"macro_f1": 0.5, "miou": 0.4}),
            Row("plain", "ombria_s1_plain", {"macro_f1": 0.25, "miou": 0.4}, test=True),
        ),
        baseline="plain",
        metrics=("pixel_accuracy", "macro_f1", "miou", "iou/water"),
        source="nowhere",
        data="elsewhere",
        note="A note.",
    ),
    Table("second", "the same row", (Row("plain", "ombria_s1_plain", {}),), "plain", ("miou",), "nowhere"),
)
TAUGHT = (
    Table(
        "taught",
        "a student before its teacher",
        (
            Row("student", "toy_student", {}, teacher="teacher"),
            Row("teacher", "toy_teacher", {}),
            Row("missing", "toy_to_come", {}),
            Row("orphan", "toy_student", {}, teacher="missing"),
        ),
        "teacher",
        ("miou",),
        "nowhere",
    ),
)


def shrunk(given: Config) -> Config:
    e = given.experiment
    e = dataclasses.replace(
        e,
        network=e.network if isinstance(e.network, toy.ToyNetwork) else FCN(width=0.0625, stages=1),
        augment=dataclasses.replace(e.augment, crop=64),
        batch_size=2,
        steps=2,
    )
    execution = dataclasses.replace(given.execution, mesh=Mesh(data=1), tensorboard=False, checkpoint_every=1)
    return dataclasses.replace(given, experiment=e, execution=execution)


def small(paper, workdir, data="ombria", **options):
    return dataclasses.replace(make_plan(paper, workdir, data=data, **options), adapt=shrunk)


@pytest.fixture(autouse=True, scope="module")
def papers():
    """The toy papers and recipes are known, and a verb does not ask for other devices than the session's."""
    student = Experiment(data=Data("toy"), inputs=Inputs(), network=toy.ToyNetwork(), method=toy.Toy(taught=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "devices", lambda host_devices=0: None)
        patch.setitem(TABLES, "two", TWO)
        patch.setitem(TABLES, "taught", TAUGHT)
        patch.setitem(recipes.RECIPES, "toy_student", lambda: Config(experiment=student))
        teacher = dataclasses.replace(student, method=toy.Toy())
        patch.setitem(recipes.RECIPES, "toy_teacher", lambda: Config(experiment=teacher))
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    fake_data.write_ombria(root / "source")
    build("ombria", root / "source", root / "built")
    return str(root / "built")


@pytest.fixture(scope="module")
def done(records, tmp_path_factory):
    """Both rows with two seeds, looked at on test where that is allowed: (folder, outcome, what was said)."""
    workdir, said = tmp_path_factory.mktemp("tables"), []
    outcome = reproduce(small("two", workdir, seeds=2, data_dir=records, test=True), say=said.append)
    return workdir / "ombria", outcome, said


def strict(path: Path):
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def started(said):
    return [line.split("] ")[1] for line in said if re.match(r"\[\d+/\d+\] ", line)]


def test_runs_all_rows_of_a_seed_first(done):
    folder, outcome, said = done
    assert started(said) == ["dice-0", "plain-0", "dice-1", "plain-1"]
    assert outcome.failures == {}
    assert not outcome.stopped
    document = strict(folder / "table.json")
    assert document == json.loads(json.dumps(outcome.document))
    assert (folder / "table.md").read_text() == markdown(document)


def test_only_marked_rows_look_at_test_and_once(done):
    folder, outcome, _ = done
    looks = {run.name: read_looks(run) for run in sorted(folder.glob("*-?"))}
    assert looks == {"dice-0": 0, "dice-1": 0, "plain-0": 1, "plain-1": 1}
    first = outcome.document["tables"][0]["splits"]
    assert {split: set(found["rows"]) for split, found in first.items()} == {
        "val": {"dice", "plain"},
        "test": {"plain"},
    }


def read_looks(run):
    return len(json.loads((run / "manifest.json").read_text()).get("test_looks", []))


def test_aggregates_what_the_runs_say(done):
    folder, outcome, _ = done
    said = [
        json.loads((folder / f"dice-{seed}" / "eval" / "val-best.json").read_text())["pooled"]["macro"]["iou"]
        for seed in range(2)
    ]
    cell = outcome.document["tables"][0]["splits"]["val"]["rows"]["dice"]["miou"]
    assert cell["values"] == {"0": said[0], "1": said[1]}
    assert cell["mean"] == pytest.approx(sum(said) / 2)
    assert cell["sd"] == pytest.approx(abs(said[0] - said[1]) / math.sqrt(2))
    assert cell["delta"] is None, "the figures are of other data"
    assert cell["minus_baseline"]["seeds"] == [0, 1]
    row = outcome.document["rows"]["dice"]
    assert row["parameters"] > 1000
    assert row["seconds"] > 0
    assert row["seeds"] == [0, 1]
    assert row["runs"]["0"]["evaluated"]["val"]["checkpoint"].startswith("best/")
    assert [line.split(":")[0] for line in row["differs"]] == ["method.dice"], "inputs are made alike"
    (machine,) = outcome.document["machines"]
    assert f"jax {jax.__version__}" in machine
    (found,) = outcome.document["records"]
    assert "2 test" in found
    assert any("batch_size" in line for line in outcome.document["setting"])
    text = (folder / "table.md").read_text()
    for part in ("own split of elsewhere: other data", "A note.", "Minus `plain`", "printed plain < dice", "±"):
        assert part in text, part


def test_skips_what_is_done(done, records, tmp_path):
    shutil.copytree(done[0].parent, tmp_path / "again")
    folder = tmp_path / "again" / "ombria"

    def times():
        return {p: p.stat().st_mtime_ns for p in folder.glob("*-?/**/*") if p.is_file()}

    before, table = times(), (folder / "table.json").read_bytes()
    plan = small("two", tmp_path / "again", seeds=2, data_dir=records, test=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "train", None)
        patch.setattr(experiments, "evaluate_run", None)
        patch.setattr(comparison, "paired_bootstrap", None)
        outcome = reproduce(plan, say=lambda line: None)
        assert outcome.failures == {}
        assert times() == before
        assert (folder / "table.json").read_bytes() == table
        # A part of it: the table still shows all that is there.
        assert reproduce(small("two", tmp_path / "again", rows=["dice"], seeds=1, data_dir=records)).failures == {}
        assert (folder / "table.json").read_bytes() == table
    # Results of another checkpoint, or written by something else, are made again.
    results = folder / "dice-0" / "eval" / "val-best.json"
    right = results.read_bytes()
    results.write_bytes(right + b"\n")
    reproduce(small("two", tmp_path / "again", rows=["dice"], seeds=1, data_dir=records), say=lambda line: None)
    assert results.read_bytes() == right
    record = rows.read_record(folder / "dice-0")
    record["evaluated"]["val"]["checkpoint"] = "best/1000"
    rows.write_record(folder / "dice-0", record)
    assert rows.read_result(folder / "dice-0", "val", "best/2") is None
    # Runs of another setting are neither mixed in nor overwritten.
    other = make_plan("two", tmp_path / "again", data="ombria", rows=["dice"], seeds=1, data_dir=records)
    outcome = reproduce(other, say=lambda line: None)
    assert "another experiment" in outcome.failures["dice-0"]
    assert len(outcome.document["left_out"]) == 4
    assert outcome.document["tables"][0]["splits"] == {}
    assert "Nothing is evaluated yet" in markdown(outcome.document)


def test_goes_on_where_a_signal_stopped_it(done, records, tmp_path):
    def plan():
        return small("two", tmp_path, rows=["dice"], seeds=2, data_dir=records)

    def during_training(line):
        if line.startswith("compiled in"):
            os.kill(os.getpid(), signal.SIGTERM)

    ours = signal.getsignal(signal.SIGTERM)
    outcome = reproduce(plan(), say=during_training)
    assert outcome.stopped
    assert outcome.failures == {}
    assert strict(tmp_path / "ombria" / "table.json")["rows"]["dice"]["seeds"] == []
    first = rows.read_record(tmp_path / "ombria" / "dice-0")
    assert set(first) == {"seconds"}
    assert experiments._last_step(tmp_path / "ombria" / "dice-0") == 1

    said = []

    def between_runs(line):
        said.append(line)
        if line.startswith("[2/2]"):
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = reproduce(plan(), say=between_runs)
    assert any("resuming at step 1" in line for line in said)
    assert outcome.stopped
    assert outcome.document["rows"]["dice"]["seeds"] == [0]
    assert rows.read_record(tmp_path / "ombria" / "dice-0")["seconds"] > first["seconds"]
    assert not (tmp_path / "ombria" / "dice-1").exists()
    assert signal.getsignal(signal.SIGTERM) is ours
    # As if it had never been stopped.
    cells = [
        o.document["tables"][0]["splits"]["val"]["rows"]["dice"]["miou"]["values"]["0"] for o in (outcome, done[1])
    ]
    assert cells[0] == cells[1]


def test_teachers_first_and_failures_aside(records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "make_plan", small)
    make = ["reproduce", "taught", "--data", "ombria", "--seeds", "1", "--data-dir", records, "--workdir", tmp_path]
    with pytest.raises(SystemExit) as e:
        cli.main([*map(str, make), "--json"])
    assert e.value.code == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document == strict(tmp_path / "ombria" / "table.json")
    assert started(err.splitlines()) == ["teacher-0", "student-0", "missing-0", "orphan-0"]
    assert set(document["failures"]) == {"missing-0", "orphan-0"}
    assert "unknown recipe 'toy_to_come'" in document["failures"]["missing-0"]
    assert "its teacher missing-0 failed" in document["failures"]["orphan-0"]
    assert err.splitlines()[-1].startswith("sarjax: 2 of 4 runs failed (missing-0, orphan-0)")
    assert (tmp_path / "ombria" / "student-0" / "teacher" / "weights.safetensors").is_file()
    assert document["rows"]["student"]["teacher"] == "teacher"
    assert set(document["tables"][0]["splits"]["val"]["rows"]) == {"teacher", "student"}
    assert "**missing-0 failed**: unknown recipe" in (tmp_path / "ombria" / "table.md").read_text()
    # A student brings its teacher; what has trained is not trained again.
    monkeypatch.setattr(experiments, "train", None)
    cli.main([*map(str, make), "--rows", "student"])
    out, err = capsys.readouterr()
    assert started(err.splitlines()) == ["teacher-0", "student-0"]
    assert out == (tmp_path / "ombria" / "table.md").read_text()


def test_what_is_wrong_is_one_sentence(tmp_path, capsys):
    for args, message in [
        (("chengg",), "did you mean 'cheng'"),
        (("cheng", "--rows", "lanet,bth"), "did you mean 'both'"),
        (("cheng", "--data", "ombra"), "did you mean 'ombria'"),
        (("cheng", "--preset", "cup"), "did you mean 'cpu'"),
        (("cheng", "--seeds", "0"), "--seeds is 0"),
        (("cheng", "--epochs", "-1"), "--epochs is -1"),
        (("cheng", "--data", "synthetic", "--data-dir", "x"), "leave it out"),
        (("cheng", "--data", "ombria", "--data-dir", str(tmp_path)), "sarjax data build ombria"),
        (("cheng", "--data-dir", str(tmp_path)), "sarjax data build whu_opt_sar"),
    ]:
        with pytest.raises(SystemExit) as e:
            cli.main(["reproduce", *args, "--workdir", str(tmp_path / "w")])
        assert e.value.code == 2
        err = capsys.readouterr().err.strip()
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_stopped_is_no_success(tmp_path, monkeypatch, capsys):
    document = {"paper": "two", "data": "ombria", "command": "", "about": "", "preset": ""}
    document |= {name: [] for name in ("records", "machines", "setting", "tested", "left_out", "tables")}
    outcome = experiments.Outcome(document | {"failures": {}, "rows": {}}, {}, True)
    monkeypatch.setattr(experiments, "reproduce", lambda plan, say: outcome)
    with pytest.raises(SystemExit) as e:
        cli.main(["reproduce", "two", "--workdir", str(tmp_path)])
    assert e.value.code == 143
    assert capsys.readouterr().out.startswith("# two on ombria")


def test_makes_scenes_and_records_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(experiments, "SCENES", 3)
    monkeypatch.setattr(experiments, "SIZE", (256, 256))
    monkeypatch.setattr(
        experiments, "synthesize", lambda *a, real=experiments.synthesize, **k: made.append(real(*a, **k))
    )
    for error in (UserError("not now."), jax.errors.JaxRuntimeError("out of memory\nat length")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(experiments, "_finish", fail)
        outcome = reproduce(make_plan("cheng", tmp_path, data="synthetic", rows=["lanet"], seeds=1), say=made.append)
        assert outcome.failures == {"lanet-0": str(error).splitlines()[0]}
    assert len([p for p in made if isinstance(p, Path)]) == 1
    assert (tmp_path / "synthetic" / "records" / "whu_opt_sar").is_dir()


SPEC = dataclasses.replace(toy.SPEC, classes=(ClassSpec("a", (0, 0, 0)), ClassSpec("b", (1, 1, 1))), excluded=())


def result(*tiles):
    per_tile = {i: np.array([[a, b], [c, d]], np.int64) for i, (a, b, c, d) in enumerate(tiles)}
    return Result(Evaluation(np.sum(list(per_tile.values()), 0), per_tile), repr(tiles))


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


def test_the_bootstrap_gets_pairs(monkeypatch):
    """Seeds that both rows have, in one order on both sides; each side {tile: matrix} by run."""
    calls = []

    def bootstrap(a, b, metric):
        calls.append((a, b, metric(np.array([[3, 1], [0, 0]]))))
        return Difference(0.5, -0.25, float("nan"))

    monkeypatch.setattr(comparison, "paired_bootstrap", bootstrap)
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
    assert found["rows"]["full"]["pixel_accuracy"]["minus_baseline"] == {
        "value": 0.5,
        "low": -0.25,
        "high": None,
        "seeds": [1, 2],
    }
    runs["full"][1] = result((9, 9, 9, 9), (1, 1, 1, 1))
    compare(table(("none", "full")), runs, SPEC, True, known)
    assert len(calls) == 2, "other results, another interval"


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


PUBLISHED = [(paper, data, preset) for paper in TABLES for data in tables.DATA for preset in ("", *tables.PRESETS)]


@pytest.mark.parametrize(("paper", "data", "preset"), PUBLISHED)
def test_rows_on_any_data(paper, data, preset):
    """All rows of a paper are trained alike: by network and method alone they differ."""
    found = {}
    for name, row in all_rows(TABLES[paper]).items():
        if row.recipe in recipes.RECIPES:
            found[name] = on(recipes.find(row.recipe), data, preset)
            config.validate(found[name])
    for table in TABLES[paper]:
        for row in table.rows:
            if row.name in found and table.baseline in found:
                for line in config.difference(found[table.baseline].experiment, found[row.name].experiment):
                    assert line.startswith(("network.", "method.")), line


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
    plan = make_plan("cheng", Path("w"), data="ombria", epochs=3.0)
    assert plan.config(plan.rows["lanet"], 4).experiment.epochs == 3.0
    assert plan.config(plan.rows["lanet"], 4).experiment.seed == 4


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
    table1, table3 = TABLES["cheng"]
    assert ".6527" in table1.note
    shared = {row.name: row for row in table3.rows}
    assert {row.name for row in table1.rows} & shared.keys() == {"lanet", "both"}
    rows = all_rows(TABLES["cheng"])
    assert len(rows) == 7
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
