"""Tables at toy size: what is run, in which order, what is skipped, and how it goes on."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import fake_data
import jax
import pytest
import toy

from sarjax import cli, experiments, recipes
from sarjax.cli import common
from sarjax.config import Config, Data, Experiment, Inputs, Mesh
from sarjax.data.build import build
from sarjax.errors import UserError
from sarjax.experiments import make_plan, reproduce
from sarjax.options import FCN
from sarjax.recipes.tables import TABLES, Row, Table
from sarjax.reports import comparison, rows
from sarjax.reports.comparison import markdown
from sarjax.train import loop

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
    for part in (
        "own split of elsewhere: other data",
        "A note.",
        "Minus `plain`",
        "printed plain < dice",
        "±",
        "95 % of 2,000 resamples",
    ):
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
        patch.setattr(comparison.bootstrap, "paired_bootstrap", None)
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


@pytest.mark.parametrize("when", ["last evaluation", "closing", "failing", "failed", "evaluating"])
def test_no_signal_is_lost(records, tmp_path, monkeypatch, when):
    """Wherever SIGTERM comes, the run is finished or noted as it is, and the next one is not begun."""

    def strike(*_):
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)

    def then(function):
        return lambda *args, **kwargs: (strike(), function(*args, **kwargs))[1]

    def fail(*_):
        if when == "failing":
            strike()
        raise UserError("no memory.")

    said = []

    def say(line):
        said.append(line)
        if (when == "failed" and "failed: no memory" in line) or (when == "evaluating" and "best/2 on val" in line):
            strike()

    if when == "last evaluation":
        monkeypatch.setattr(loop, "run_evaluation", then(loop.run_evaluation))
    elif when == "closing":
        monkeypatch.setattr(loop.Checkpoints, "close", then(loop.Checkpoints.close))
    elif when.startswith("fail"):
        monkeypatch.setattr(loop, "summary", fail)
    before = signal.getsignal(signal.SIGTERM)
    outcome = reproduce(small("two", tmp_path, rows=["dice"], seeds=2, data_dir=records), say=say)
    assert outcome.stopped
    assert started(said) == ["dice-0"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert experiments._last_step(tmp_path / "ombria" / "dice-0") == (0 if when.startswith("fail") else 2)
    again = []
    outcome = reproduce(small("two", tmp_path, rows=["dice"], seeds=1, data_dir=records), say=again.append)
    assert (outcome.stopped, outcome.failures) == (False, {})
    assert any("starting" in line for line in again) == when.startswith("fail"), "what was finished is"


def test_evaluated_equally_often_on_any_data(records, tmp_path, monkeypatch):
    def longer(config):
        config = shrunk(config)
        return dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, steps=9, batch_size=4))

    monkeypatch.setattr(experiments, "EVALUATIONS", 2)
    plan = dataclasses.replace(small("two", tmp_path, rows=["dice"], seeds=1, data_dir=records), adapt=longer)
    assert reproduce(plan, say=lambda line: None).failures == {}
    lines = (tmp_path / "ombria" / "dice-0" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "val/miou" in row] == [5, 9]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write(text):
    return lambda path: path.write_text(text)


def put(**values):
    return lambda path: edit(path, lambda content: content.update(values))


@pytest.mark.parametrize(
    ("file", "harm", "sentence"),
    [
        ("config.json", write('{"recipe": "om'), "config.json is no configuration"),
        ("config.json", write("[]"), "config.json is no configuration"),
        ("config.json", lambda path: path.unlink(), "holds no run"),
        ("spec.json", write("{"), "spec.json or stats.json of .* cannot be read"),
        ("stats.json", write("{}"), "spec.json or stats.json of .* cannot be read"),
        ("manifest.json", write("{}"), "manifest.json names no start"),
        ("manifest.json", put(starts=None), "manifest.json names no start"),
        ("manifest.json", put(starts=[]), "manifest.json names no start"),
        ("manifest.json", write("{"), "manifest.json is damaged"),
        ("manifest.json", put(extended_to=9), "it was extended to step 9"),
        ("manifest.json", put(init_from="elsewhere"), "it started from elsewhere"),
        (
            "config.json",
            lambda path: edit(path, lambda c: c["experiment"]["data"].update(fingerprint="other")),
            "another experiment than is asked for .data.fingerprint: 'other' -> ",
        ),
        ("reproduce.json", put(best=1), "its results on val are of best/2, but best/1 is its best"),
        ("reproduce.json", put(best=None), "its results on val are of best/2, but checkpoints/2 is its best"),
        ("reproduce.json", lambda path: edit(path, lambda c: c.pop("best")), "names no best checkpoint"),
    ],
)
def test_a_run_that_does_not_belong_is_left_out(done, records, tmp_path, file, harm, sentence):
    """With a sentence, and the others stay in the table."""
    shutil.copytree(done[0], tmp_path / "ombria", ignore=shutil.ignore_patterns("checkpoints", "best", "events"))
    plan = small("two", tmp_path, seeds=2, data_dir=records)
    harm(tmp_path / "ombria" / "dice-1" / file)
    document = experiments.write_table(plan, experiments._open_all(plan), {})
    (line,) = document["left_out"]
    assert re.match(f"dice-1: .*{sentence}", line)
    assert {name: row["seeds"] for name, row in document["rows"].items()} == {"dice": [0], "plain": [0, 1]}
    assert document["tables"][0]["splits"]["val"]["rows"]["dice"]["miou"]["n"] == 1
    assert f"Left out: {line}" in (tmp_path / "ombria" / "table.md").read_text()


def test_a_run_that_went_its_own_way_is_not_trained(done, records, tmp_path):
    shutil.copytree(done[0], tmp_path / "ombria")
    run = tmp_path / "ombria" / "dice-0"
    put(extended_to=4)(run / "manifest.json")
    before = (run / "metrics.jsonl").read_bytes()
    outcome = reproduce(small("two", tmp_path, rows=["dice"], seeds=1, data_dir=records), say=lambda line: None)
    assert outcome.failures == {"dice-0": "it was extended to step 4; a run of the row's own length is accepted."}
    assert (run / "metrics.jsonl").read_bytes() == before
    assert outcome.document["rows"]["dice"]["seeds"] == [1]


@pytest.mark.parametrize("harm", ["older", "damaged"])
def test_only_the_best_is_evaluated_as_best(done, records, tmp_path, harm):
    """A run whose best is not what its last checkpoint says was best, not yet evaluated."""
    shutil.copytree(done[0], tmp_path / "ombria", ignore=shutil.ignore_patterns("eval"))
    run = tmp_path / "ombria" / "dice-0"
    (run / "reproduce.json").unlink()
    if harm == "older":
        (run / "best" / "2").rename(run / "best" / "1")
        (run / "best" / "2.digests.json").rename(run / "best" / "1.digests.json")
    else:
        next(p for p in (run / "best" / "2").rglob("*") if p.is_file() and p.stat().st_size).write_bytes(b"")
    plan = small("two", tmp_path, rows=["dice"], seeds=1, data_dir=records)
    outcome = reproduce(plan, say=lambda line: None)
    assert set(outcome.failures) == {"dice-0"}
    assert "best/2, its best on val, is not there or not whole" in outcome.failures["dice-0"]
    assert not (run / "eval").exists()
    assert outcome.document["tables"][0]["splits"] == {}


def test_devices_are_those_of_the_runs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "visible_cores", lambda: 2)
    plan = small("two", tmp_path)
    assert experiments.host_devices(plan) == 2
    for name, text in (("dice-0", "{"), ("dice-1", "{}"), ("plain-0", '{"host_devices": 5}')):
        (tmp_path / "ombria" / name).mkdir(parents=True)
        (tmp_path / "ombria" / name / "manifest.json").write_text(text)
    assert experiments.host_devices(plan) == 5


def test_teachers_first_and_failures_aside(records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "make_plan", small)
    make = ["reproduce", "taught", "--data", "ombria", "--seeds", "2", "--data-dir", records, "--workdir", tmp_path]
    with pytest.raises(SystemExit) as e:
        cli.main([*map(str, make), "--json"])
    assert e.value.code == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document == strict(tmp_path / "ombria" / "table.json")
    jobs = [f"{name}-{seed}" for seed in range(2) for name in ("teacher", "student", "missing", "orphan")]
    assert started(err.splitlines()) == jobs
    assert set(document["failures"]) == {"missing-0", "orphan-0", "missing-1", "orphan-1"}
    assert "unknown recipe 'toy_to_come'" in document["failures"]["missing-0"]
    assert "its teacher missing-0 failed" in document["failures"]["orphan-0"]
    assert err.splitlines()[-1].startswith("sarjax: 4 of 8 runs failed (missing-0, orphan-0, missing-1, orphan-1)")
    for seed in range(2):
        copied = tmp_path / "ombria" / f"student-{seed}" / "teacher"
        assert (copied / "weights.safetensors").is_file()
        assert strict(copied / "origin.json")["run"] == str(tmp_path / "ombria" / f"teacher-{seed}")
    assert document["rows"]["student"]["teacher"] == "teacher"
    assert set(document["tables"][0]["splits"]["val"]["rows"]) == {"teacher", "student"}
    assert "**missing-0 failed**: unknown recipe" in (tmp_path / "ombria" / "table.md").read_text()
    # A student brings its teacher; what has trained is not trained again.
    monkeypatch.setattr(experiments, "train", None)
    cli.main([*map(str, make), "--rows", "student"])
    out, err = capsys.readouterr()
    assert started(err.splitlines()) == ["teacher-0", "student-0", "teacher-1", "student-1"]
    assert out == (tmp_path / "ombria" / "table.md").read_text()
    # A student that has its copy needs its teacher's run no more.
    shutil.rmtree(tmp_path / "ombria" / "student-0" / "eval")
    (tmp_path / "ombria" / "teacher-0" / "config.json").write_text("{")
    outcome = reproduce(small("taught", tmp_path, rows=["student"], seeds=1, data_dir=records), say=lambda line: None)
    assert set(outcome.failures) == {"teacher-0"}
    assert outcome.document["rows"]["student"]["seeds"] == [0, 1]
    assert (tmp_path / "ombria" / "student-0" / "eval" / "val-best.json").is_file()


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
