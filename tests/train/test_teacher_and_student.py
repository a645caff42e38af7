"""The two stages of DHFA-Net as runs: an optical teacher, then a student that needs neither it nor its sensor."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sarjax.config import Inputs, Optimizer
from sarjax.errors import UserError
from sarjax.options import Distillation, Supervised
from sarjax.train import loop
from sarjax.train import teacher as teachers
from sarjax.train.feed import run_evaluation
from sarjax.train.mesh import make_mesh, path_name
from sarjax.train.run import newest_whole, restore_run

DATA = toy.dataset()
SILENT = {"dataset": DATA, "say": lambda line: None}
STUDENT = toy.config(Distillation(), steps=3, precision="bfloat16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a teacher that is gone and of the student that it taught, and what the teacher was."""
    folder = tmp_path_factory.mktemp("stages")
    teacher = toy.config(Supervised(), steps=3, inputs=Inputs(modalities=("optical",), normalisation="tile"))
    state = loop.train(teacher, folder / "teacher", **SILENT)
    loop.train(STUDENT, folder / "student", teacher=folder / "teacher", **SILENT)
    shutil.rmtree(folder / "teacher")
    return folder, state


def test_the_student_keeps_a_copy_that_nothing_changes(runs):
    folder, state = runs
    kept = teachers.load(folder / "student", make_mesh(STUDENT.execution.mesh))
    jax.tree.map(np.testing.assert_array_equal, kept.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, kept.stats, state.stats)
    checkpoints, step = newest_whole(folder / "student", ("checkpoints",), print)
    stored = checkpoints.stored(step)
    trained = {**stored["params"]}
    assert "hfdm" not in trained, "the same channels need no projection"
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert names == {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert "frozen" not in stored


def test_the_teacher_runs_in_the_students_precision_and_normalisation_of_its_own(runs):
    folder, state = runs
    teacher = teachers.describe(folder / "student" / "teacher", "bfloat16")
    assert teacher.experiment.inputs == Inputs(modalities=("optical",), normalisation="tile")
    rows = {k: jnp.asarray(np.stack([t[k] for t in DATA.split("val")])) for k in ("optical", "optical_valid")}
    prediction = teacher.method.forward(state.params, state.stats, rows)
    assert prediction.embedding.dtype == jnp.bfloat16
    assert prediction.logits.dtype == jnp.float32


def test_sar_is_all_that_a_trained_student_needs(runs):
    folder, _ = runs
    shutil.move(folder / "student" / "teacher", folder / "away")
    try:
        mesh = make_mesh(STUDENT.execution.mesh)
        restored = restore_run(folder / "student", mesh, say=lambda line: None)
        spec = dataclasses.replace(DATA.spec, modalities=DATA.spec.modalities[:1])
        blind = dataclasses.replace(DATA, spec=spec)
        _, head = restored.head()
        count = loop.make_count_step(head.predict, spec.num_classes)
        found = run_evaluation(count, head, restored.params, restored.stats, blind, "val", restored.config, mesh)
        assert found.confusion.sum() > 0
    finally:
        shutil.move(folder / "away", folder / "student" / "teacher")


def test_it_is_said_who_teaches(tmp_path):
    """A teacher that stopped half-way, that goes on after it was copied, and that has learnt nothing yet."""
    config = toy.config(Supervised(), inputs=Inputs(modalities=("optical",)), steps=4)
    said = []

    def stop_after(step):
        return lambda self, at: at == step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sarjax.train.stop.StopFlag.requested", stop_after(2))
        loop.train(config, tmp_path / "teacher", **SILENT)
    student = toy.config(Distillation(), steps=1)
    options = {"teacher": tmp_path / "teacher", "dataset": DATA, "say": said.append}
    loop.train(student, tmp_path / "student", **options)
    assert f"{tmp_path / 'teacher'} is trained to step 2 of 4 only, and teaches as it is" in said
    assert any(line.startswith(f"teacher: {tmp_path / 'teacher'}, ") for line in said)
    loop.train(config, tmp_path / "teacher", **SILENT)
    said.clear()
    loop.train(student, tmp_path / "student", extend_steps=2, **options)
    assert any("by now; its copy in" in line for line in said)

    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "teacher" / "config.json", tmp_path / "empty")
    for name in ("spec.json", "stats.json"):
        shutil.copy(tmp_path / "teacher" / name, tmp_path / "empty")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        loop.train(student, tmp_path / "other", **options | {"teacher": tmp_path / "empty"})
    assert not (tmp_path / "other").exists()


def test_a_student_starts_from_a_network_alone(tmp_path):
    """What a method has beside its network is fresh; the network's own parameters are those of the run."""
    optical = toy.config(Supervised(), steps=1, inputs=Inputs(modalities=("optical",)))
    loop.train(optical, tmp_path / "teacher", **SILENT)
    plain = loop.train(toy.config(Supervised(), steps=1), tmp_path / "plain", **SILENT)
    said = []
    still = Optimizer(name="sgd", learning_rate=0.0)
    state = loop.train(
        toy.config(Distillation(reading="hallucinate"), steps=1, optimizer=still), tmp_path / "student",
        teacher=tmp_path / "teacher", init_from=tmp_path / "plain", dataset=DATA, say=said.append,
    )  # fmt: skip
    assert any("fresh: hfdm/" in line for line in said)
    network = {k: v for k, v in state.params.items() if k != "hfdm"}
    jax.tree.map(np.testing.assert_array_equal, network, plain.params)
    back = loop.train(
        toy.config(Supervised(), steps=1, optimizer=still), tmp_path / "back", init_from=tmp_path / "student", **SILENT
    )
    jax.tree.map(np.testing.assert_array_equal, back.params, plain.params)


def test_the_student_resumes_without_naming_its_teacher(runs):
    folder, _ = runs
    state = loop.train(STUDENT, folder / "student", extend_steps=4, **SILENT)
    assert int(state.step) == 4
    with pytest.raises(UserError, match="needs a teacher: give --teacher RUN"):
        loop.train(STUDENT, folder / "orphan", **SILENT)
    assert not (folder / "orphan").exists()
