"""Tables that a signal stopped go on; runs that are not as their row says are left out, with a sentence."""

import json
import os
import re
import shutil
import signal

import pytest
from toy_tables import small, started, strict

from sarjax import experiments
from sarjax.errors import UserError
from sarjax.experiments import reproduce
from sarjax.reports import rows
from sarjax.train import loop


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
