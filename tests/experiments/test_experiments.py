"""Tables at toy size: what is run, in which order, what is skipped, and what the table says."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import pytest
from toy_tables import shrunk, small, started, strict

from sarjax import cli, experiments
from sarjax.errors import UserError
from sarjax.experiments import make_plan, reproduce
from sarjax.reports import comparison, rows
from sarjax.reports.comparison import markdown


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


def test_evaluated_equally_often_on_any_data(records, tmp_path, monkeypatch):
    def longer(config):
        config = shrunk(config)
        return dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, steps=9, batch_size=4))

    monkeypatch.setattr(experiments, "EVALUATIONS", 2)
    plan = dataclasses.replace(small("two", tmp_path, rows=["dice"], seeds=1, data_dir=records), adapt=longer)
    assert reproduce(plan, say=lambda line: None).failures == {}
    lines = (tmp_path / "ombria" / "dice-0" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "val/miou" in row] == [5, 9]


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
        cli.main(["reproduce", "two", "--data", "ombria", "--workdir", str(tmp_path)])
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
