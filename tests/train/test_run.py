"""The method record end to end: streams, teacher, memory, heads, auxiliary; and what a run's directory refuses."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import toy
from toy import train

from sarjax import config as configs
from sarjax.config import Data, Mesh
from sarjax.data.pipeline import Batches, labelled_split
from sarjax.errors import UserError
from sarjax.methods import supervised
from sarjax.options import Supervised
from sarjax.train import loop, run
from sarjax.train.checkpoint import Checkpoints
from sarjax.train.feed import make_batches
from sarjax.train.mesh import make_mesh
from sarjax.train.run import read_config, read_manifest, restore_run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    train(toy.config(toy.Toy()), workdir)
    return workdir


def test_everything_a_method_may_have(teacher, tmp_path):
    cfg = toy.config(toy.Toy(taught=True))
    state, said = train(cfg, tmp_path / "student", teacher=teacher)
    workdir = tmp_path / "student"
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "manifest.json", "spec.json", "stats.json", "metrics.jsonl", "checkpoints", "best"} <= names
    assert {p.name for p in (workdir / "teacher").iterdir()} == {
        "config.json", "spec.json", "stats.json", "weights.safetensors", "origin.json",
    }  # fmt: skip
    assert (np.asarray(state.memory["neighbours"])[:, 0] >= 0).all(), "refreshed at the epoch's end"
    stored = Checkpoints(workdir / "checkpoints", read_only=True).stored(6)
    assert "frozen" not in stored
    assert set(stored["params"]) == {"encoder", "main", "other", "auxiliary"}, "no teacher in the checkpoint"
    text = " ".join(said)
    assert "parameters" in text
    assert "GFLOP" in text
    assert "6 steps, 1.5 an epoch of 12 labelled tiles" in text
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [r for r in rows if "loss" in r]
    assert [r["step"] for r in losses] == [1, 2, 3, 4, 5, 6]
    assert {"main", "partner", "taught", "small", "hits", "learning_rate"} <= set(losses[0])
    assert [r["step"] for r in rows if "val/miou" in r] == [3, 6]
    assert all(0 < r["val/map"] <= 1 for r in rows if "val/miou" in r)


def test_a_student_predicts_without_its_teacher(teacher, tmp_path):
    workdir = tmp_path / "student"
    state, _ = train(toy.config(toy.Toy(taught=True)), workdir, teacher=teacher)
    (workdir / "teacher" / "weights.safetensors").unlink()
    restored = restore_run(workdir, make_mesh(Mesh(), jax.devices()[:1]), checkpoint="last")
    assert set(restored.method.heads) == {"main", "other"}
    batch = {k: v[None] for k, v in toy.dataset().split("val")[0].items()}
    a, b = (h.predict(restored.params, restored.stats, batch) for h in restored.method.heads.values())
    assert a.shape == b.shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(restored.params["main"]["kernel"], state.params["main"]["kernel"])


def test_the_teacher_is_watched(teacher, tmp_path):
    workdir, cfg = tmp_path / "student", toy.config(toy.Toy(taught=True))
    with pytest.raises(UserError, match="needs a teacher"):
        train(cfg, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    with pytest.raises(UserError, match="takes no teacher"):
        train(toy.config(Supervised()), tmp_path / "none", teacher=teacher)
    train(cfg, workdir, teacher=teacher)
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    again = dataclasses.replace(toy.config(toy.Toy()).execution, log_every=3)
    train(dataclasses.replace(toy.config(toy.Toy()), execution=again), moved, extend_steps=8)
    train(cfg, workdir, teacher=moved)  # what becomes of the teacher's run does not matter
    train(cfg, workdir, teacher=tmp_path / "gone")
    other = tmp_path / "another"
    train(toy.config(toy.Toy(), seed=5), other)
    with pytest.raises(UserError, match=r"copy of another teacher.*seed: 0 -> 5"):
        train(cfg, workdir, teacher=other)
    weights = workdir / "teacher" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="have changed since the run began"):
        train(cfg, workdir)


def test_a_teacher_that_does_not_fit(teacher, tmp_path):
    spec = dataclasses.replace(toy.SPEC, classes=toy.SPEC.classes[:2], excluded=())
    with pytest.raises(UserError, match="the teacher knows 3 classes"):
        train(toy.config(toy.Toy(taught=True)), tmp_path / "x", teacher=teacher, dataset=toy.dataset(spec=spec))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("mesh", [Mesh(8), Mesh(4, 2)])
def test_sharded_over_eight_devices(teacher, tmp_path, mesh):
    cfg = toy.config(toy.Toy())
    execution = dataclasses.replace(cfg.execution, mesh=mesh)
    sharded, _ = train(dataclasses.replace(cfg, execution=execution), tmp_path / "run")
    one = restore_run(teacher, make_mesh(Mesh()), checkpoint="last")
    for a, b in zip(jax.tree.leaves(sharded.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_another_experiment_is_refused_with_the_difference(tmp_path):
    cfg = toy.config(Supervised(), steps=2)
    train(cfg, tmp_path)
    with pytest.raises(UserError, match=r"seed: 0 -> 1.*another --workdir"):
        train(dataclasses.replace(cfg, experiment=dataclasses.replace(cfg.experiment, seed=1)), tmp_path)
    with pytest.raises(UserError, match=r"data.fingerprint: 'toy-32-0' -> 'toy-32-9'"):
        train(cfg, tmp_path, dataset=toy.dataset(seed=9))
    free = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, log_every=2))
    _, said = train(free, tmp_path)
    assert "trained to its last step" in said[-1]


def test_an_extension_goes_on_with_the_same_command(tmp_path, monkeypatch):
    cfg = toy.config(Supervised(), steps=2)
    with pytest.raises(UserError, match="no run whose steps could be extended"):
        train(cfg, tmp_path / "none", extend_steps=4)
    train(cfg, tmp_path)
    for fewer in (1, 2):
        with pytest.raises(UserError, match=rf"--extend-steps {fewer} does not extend .* goes to step 2"):
            train(cfg, tmp_path, extend_steps=fewer)
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopFlag, "requested", lambda self, step: step == 3)
        state, _ = train(cfg, tmp_path, extend_steps=5)
    assert int(state.step) == 3
    before = read_config(tmp_path)
    state, _ = train(cfg, tmp_path, init_from=tmp_path / "of no use any more")
    assert int(state.step) == 5
    assert read_manifest(tmp_path)["extended_to"] == 5
    assert "init_from" not in read_manifest(tmp_path), "the parameters are the checkpoint's"
    assert read_config(tmp_path) == before
    assert before.experiment.steps == 2
    assert [start["step"] for start in read_manifest(tmp_path)["starts"]] == [0, 2, 3]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(toy.config(Supervised()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("last", ["spec.json", "stats.json", "manifest.json", "config.json"])
def test_a_start_that_died_while_it_claimed_its_directory(tmp_path, monkeypatch, last):
    """Before or while `last` is written: the next start takes the directory, and nothing of the dead one."""
    cfg, written = toy.config(Supervised(), steps=1), run.write_atomically

    def die(path, data):
        if path.name == last:
            path.with_name(f".{path.name}.123.tmp").write_text("{")
            raise KeyboardInterrupt
        written(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            train(cfg, tmp_path / "run")
    if last == "config.json":
        run.write_manifest(tmp_path / "run", read_manifest(tmp_path / "run") | {"weights_sha256": "of others"})
    assert int(train(cfg, tmp_path / "run")[0].step) == 1
    assert not list((tmp_path / "run").glob(".*"))
    assert "weights_sha256" not in read_manifest(tmp_path / "run")


@pytest.mark.parametrize("names", [["manifest.json"], ["spec.json", "thesis.txt"], ["spec.json", ".thesis.json.1.tmp"]])
def test_what_no_start_leaves_is_left_alone(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(toy.config(Supervised()), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_a_signal_in_the_last_step_ends_nothing_and_is_handed_on(tmp_path, monkeypatch):
    """To a handler that was there before; where there was none, the run ends like any other."""
    handed, evaluated = [], loop.run_evaluation

    def strike(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluated(*args)

    monkeypatch.setattr(loop, "run_evaluation", strike)
    ours = signal.getsignal(signal.SIGTERM)
    try:
        for handler, expected in ((lambda *_: handed.append(1), [1]), (signal.SIG_DFL, [1]), (signal.SIG_IGN, [1])):
            signal.signal(signal.SIGTERM, handler)
            workdir = tmp_path / str(len(list(tmp_path.iterdir())))
            cfg = toy.config(Supervised(), steps=2)
            state, said = train(cfg, workdir)
            assert int(state.step) == 2
            assert Checkpoints(workdir / "checkpoints", read_only=True).fault(2) is None
            assert not any("stopped by signal" in line for line in said)
            assert handed == expected
            assert signal.getsignal(signal.SIGTERM) is handler
        # In time: the run stops, and nobody else is told.
        signal.signal(signal.SIGTERM, lambda *_: handed.append(2))
        cfg = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, evaluate_every=1))
        state, _ = train(cfg, tmp_path / "early")
        assert (int(state.step), handed) == (1, [1])
    finally:
        signal.signal(signal.SIGTERM, ours)


def test_a_checkpoint_comes_after_the_best_that_it_names(tmp_path, monkeypatch):
    """However long the best takes: it is whole before anything of the checkpoint is written."""
    named, save = [], Checkpoints.save

    def watched(self, step, state, position):
        if self.directory.name == "checkpoints" and position["best"]:
            named.append(position["best"]["step"])
            assert Checkpoints(tmp_path / "best", read_only=True).fault(named[-1]) is None
        save(self, step, state, position)

    monkeypatch.setattr(Checkpoints, "save", watched)
    cfg = toy.config(toy.Toy(), steps=3)
    execution = dataclasses.replace(cfg.execution, evaluate_every=1, checkpoint_every=1)
    train(dataclasses.replace(cfg, execution=execution), tmp_path)
    assert named[0] == 1
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).position(3)["best"]["step"] == named[-1]


def test_after_a_refresh_partners_are_those_of_the_new_table(tmp_path, monkeypatch):
    """Although the batches that follow were read ahead with the old one."""
    cfg, read, taken, tables = toy.config(toy.Toy()), set(), [], {0: None}
    get, refreshed, put_batch = Batches.__getitem__, loop.refreshed, loop.put_batch

    def watched(self, step):
        batch = get(self, step)
        read.add(step)
        return batch

    def late(method, state, *rest):
        """Not before the batch of the step that comes next has been read ahead."""
        done = int(state.step)
        for _ in range(1000):
            if done in read or done == 6:
                break
            time.sleep(0.02)
        assert done in read or done == 6
        state = refreshed(method, state, *rest)
        tables[done] = np.asarray(state.memory["neighbours"])
        read.clear()
        return state

    def put(mesh, batch):
        if "partner" in batch:
            taken.append(np.array(batch["partner"]["position"]))
        return put_batch(mesh, batch)

    monkeypatch.setattr(Batches, "__getitem__", watched)
    monkeypatch.setattr(loop, "refreshed", late)
    monkeypatch.setattr(loop, "put_batch", put)
    cfg = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, prefetch=4))
    train(cfg, tmp_path)
    assert len(taken) == 6
    assert {2, 3} & tables.keys()
    mesh, data = make_mesh(cfg.execution.mesh), toy.dataset()
    batches = make_batches(loop.make_method(cfg, data, None, tmp_path, 0)[0], data, cfg, mesh)
    tables[0] = np.full((toy.SIZES["train"], 2), -1)
    for step, positions in enumerate(taken):
        batches.tables = {"neighbours": tables[max(done for done in tables if done <= step)]}
        np.testing.assert_array_equal(positions, batches.indices(step, "partner"), err_msg=f"step {step}")


def test_steps_that_stay_bad_stop_the_run(tmp_path):
    cfg = toy.config(Supervised(), optimizer=configs.Optimizer(name="sgd", learning_rate=1e30), steps=12)
    cfg = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, max_bad_steps=3, checkpoint_every=1))
    with pytest.raises(UserError, match=r"not finite 3 steps in a row.*the last good checkpoint is .*checkpoints/"):
        train(cfg, tmp_path / "run")


def test_what_the_data_do_not_hold_is_named(tmp_path):
    spec = dataclasses.replace(toy.SPEC, modalities=toy.SPEC.modalities[1:])
    with pytest.raises(UserError, match=r"'sar'.*'toy'"):
        train(toy.config(Supervised()), tmp_path / "run", dataset=toy.dataset(spec=spec))
    with pytest.raises(UserError, match=r"'toy' needs 'sar', which data set 'toy' does not hold"):
        train(toy.config(toy.Toy()), tmp_path / "run2", dataset=toy.dataset(spec=spec))


def test_rows_that_devices_cannot_share(tmp_path):
    with pytest.raises(UserError, match="8 devices with 2 microbatches cannot share equally; a multiple of 16"):
        train(toy.config(Supervised(), accumulate=2), tmp_path / "run")


def test_accumulation_says_what_sees_a_microbatch_only(tmp_path):
    cfg = toy.config(Supervised(dice=1.0), batch_size=16, accumulate=2, steps=1)
    _, said = train(cfg, tmp_path / "run")
    assert any("batch-norm, Dice see a microbatch only" in line for line in said)


def test_a_resume_elsewhere_says_that_bits_may_differ(tmp_path, monkeypatch):
    cfg = toy.config(toy.Toy())
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopFlag, "requested", lambda self, step: step == 4)
        state, said = train(cfg, tmp_path)
    assert int(state.step) == 4
    other = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, mesh=Mesh(4, 2)))
    state, said = train(other, tmp_path)
    assert int(state.step) == 6
    assert any("not bit-identical" in line and "mesh.fsdp: 1 -> 2" in line for line in said)


def test_a_run_without_a_best_is_evaluated_at_its_last(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopFlag, "requested", lambda self, step: step == 1)
        train(toy.config(toy.Toy()), tmp_path)
    assert list((tmp_path / "best").iterdir()) == []
    assert restore_run(tmp_path, make_mesh(Mesh())).checkpoint == "checkpoints/1"


def test_a_best_of_steps_yet_to_come_is_forgotten(tmp_path):
    """The newest checkpoint is lost, and the best is of a later step than the one that is resumed from."""
    cfg = toy.config(toy.Toy())
    state, _ = train(cfg, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    best = Checkpoints(tmp_path / "best")
    best.forget_after(0)
    assert best.steps() == []
    best.save(5, state, {"best": None})
    best.close()
    position = Checkpoints(tmp_path / "checkpoints", read_only=True).position(4)
    _, said = train(cfg, tmp_path)
    assert position["best"]["step"] == 3
    assert any(
        re.match(r"best/3, the best on val so far \(mIoU 0\.\d+\), is not there any more", line) for line in said
    )
    assert Checkpoints(tmp_path / "best", read_only=True).steps() == [6]


def test_tensorboard_events(tmp_path, monkeypatch):
    cfg = toy.config(toy.Toy())
    cfg = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, tensorboard=True))
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopFlag, "requested", lambda self, step: step == 3)
        train(cfg, tmp_path)
    train(cfg, tmp_path)
    assert len(list((tmp_path / "events").glob("events.out.tfevents.*"))) == 2


def test_labels_are_needed_to_learn_from_them(tmp_path):
    data = toy.dataset()
    blank = dataclasses.replace(data, statistics=dataclasses.replace(data.statistics, class_pixels=(0, 0, 0)))
    with pytest.raises(UserError, match="no pixel of data set 'toy' is labelled in train, and method 'supervised'"):
        loop.train(toy.config(), tmp_path / "run", dataset=blank, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_few_labels_are_those_that_the_run_began_with(tmp_path):
    """Nothing is drawn without a label in it, and nothing else on resume."""
    one = [s for s in range(40) if labelled_split(12, 1 / 12, s)[0][0] == 3]  # the tile that is ignored whole
    cfg = toy.config(Supervised(), steps=2, data=Data("toy", labelled=1 / 12, labelled_seed=one[0]))
    with pytest.raises(UserError, match=r"none of the 1 tiles that .* has a labelled pixel; a larger share"):
        train(cfg, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    cfg = toy.config(Supervised(), steps=2, data=Data("toy", labelled=0.5))
    train(cfg, tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["labelled"] == labelled_split(12, 0.5, 0)[0].tolist()
    content["labelled"][0] += 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has learnt from the labels of other tiles"):
        train(cfg, tmp_path / "run", extend_steps=4)


def test_what_is_above_its_limit_is_said_once(tmp_path, monkeypatch, capsys):
    def limited(options, context):
        method = plain(options, context)
        return method._replace(limits={"pixel_accuracy": (-1.0, "It is meant to be."), "loss": (1e9, "Never.")})

    plain = supervised.supervised
    monkeypatch.setattr("sarjax.methods.supervised.supervised", limited)
    cfg = toy.config(Supervised(), steps=4)
    cfg = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, log_every=1))
    state, _ = train(cfg, tmp_path / "run")
    assert int(state.step) == 4
    assert "".join(capsys.readouterr()).count("It is meant to be.") == 1
    method = limited(cfg.experiment.method, loop.Context(cfg.experiment, toy.SPEC, toy.dataset().statistics, None))
    said, known = [], set()
    for step, value in ((1, -2.0), (2, 0.25), (3, 0.5)):
        known |= set(loop.say_exceeded({"pixel_accuracy": value, "loss": 1.0}, method, step, known, said.append))
    assert said == ["step 2: pixel_accuracy is 0.25, above -1: It is meant to be."]
