"""The method record end to end: streams, teacher, memory, heads, auxiliary; and what a run's directory refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import toy

from sarjax import config as configs
from sarjax.config import Mesh
from sarjax.errors import UserError
from sarjax.options import FCN, Supervised
from sarjax.train import loop
from sarjax.train.checkpoint import Checkpoints
from sarjax.train.mesh import make_mesh
from sarjax.train.run import read_config, read_manifest, restore_run


def train(cfg, workdir, **kwargs):
    said = []
    state = loop.train(cfg, workdir, say=said.append, **({"dataset": toy.dataset()} | kwargs))
    return state, said


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
    state, _ = train(cfg, tmp_path)
    assert int(state.step) == 5
    assert read_config(tmp_path) == before
    assert before.experiment.steps == 2
    assert [start["step"] for start in read_manifest(tmp_path)["starts"]] == [0, 2, 3]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(toy.config(Supervised()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_warm_start_keeps_all_but_a_head_of_other_classes(tmp_path):
    cfg = toy.config(Supervised(), steps=2)
    train(cfg, tmp_path / "a")
    spec = dataclasses.replace(toy.SPEC, classes=toy.SPEC.classes[:2], excluded=())
    data = toy.dataset(spec=spec)
    still = dataclasses.replace(
        cfg, experiment=dataclasses.replace(cfg.experiment, optimizer=configs.Optimizer(learning_rate=0.0), steps=1)
    )
    second, said = train(still, tmp_path / "b", init_from=tmp_path / "a", dataset=data)
    assert any("fresh: " in line and "kernel" in line for line in said)
    best = restore_run(tmp_path / "a", make_mesh(Mesh()))
    np.testing.assert_array_equal(
        second.params["encoder"]["conv1"]["kernel"], best.params["encoder"]["conv1"]["kernel"]
    )
    wider = dataclasses.replace(still.experiment, network=FCN(width=0.125, stages=1))
    with pytest.raises(UserError, match="has another network"):
        train(dataclasses.replace(still, experiment=wider), tmp_path / "c", init_from=tmp_path / "a", dataset=data)


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


def test_the_encoder_starts_from_a_file(tmp_path):
    from safetensors.numpy import save_file

    from sarjax.models.torchvision import layout

    rng = np.random.default_rng(0)
    shapes = {key: entry.shape for key, entry in layout("resnet18", width=0.0625).items()}
    weights = {key: rng.uniform(0.5, 1.0, shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(weights, tmp_path / "r18.safetensors")
    network = FCN(width=0.0625, stages=1, weights=str(tmp_path / "r18.safetensors"))
    still = configs.Optimizer(name="sgd", learning_rate=0.0, ema=0.5)
    state, _ = train(toy.config(Supervised(), network=network, optimizer=still, steps=1), tmp_path / "run")
    kernel = np.asarray(state.params["encoder"]["conv1"]["kernel"])
    expected = weights["conv1.weight"].mean(1, keepdims=True).transpose(2, 3, 1, 0) * 3
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.ema["encoder"]["conv1"]["kernel"], kernel)
    gone = toy.config(Supervised(), network=dataclasses.replace(network, weights=str(tmp_path / "gone.safetensors")))
    with pytest.raises(UserError, match=r"no weight file .*gone\.safetensors"):
        train(gone, tmp_path / "run2")
    assert not (tmp_path / "run2").exists(), "nothing half-written"


def test_equal_numbers_of_other_classes_get_a_fresh_head(tmp_path):
    train(toy.config(Supervised(), steps=1), tmp_path / "a")
    renamed = tuple(dataclasses.replace(c, name=f"other {c.name}") for c in toy.SPEC.classes)
    data = toy.dataset(spec=dataclasses.replace(toy.SPEC, classes=renamed, excluded=()))
    _, said = train(toy.config(Supervised(), steps=1, seed=1), tmp_path / "b", init_from=tmp_path / "a", dataset=data)
    assert any("fresh: " in line for line in said)
    _, said = train(toy.config(Supervised(), steps=1, seed=1), tmp_path / "c", init_from=tmp_path / "a")
    assert any("started from" in line and "fresh" not in line for line in said)


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
    train(cfg, tmp_path)
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
