"""The two stages of DHFA-Net as runs: an optical teacher, then a student that needs neither it nor its sensor."""

import dataclasses
import re
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


def test_the_copy_is_the_teachers_best_with_its_own_statistics(tmp_path):
    """Not its last, and normalised as the teacher's data are, not as its student's."""
    other = dataclasses.replace(
        DATA,
        statistics=dataclasses.replace(
            DATA.statistics,
            bands={
                m: dataclasses.replace(b, mean=tuple(1 + x for x in b.mean)) for m, b in DATA.statistics.bands.items()
            },
        ),
    )
    optical = toy.config(Supervised(), steps=3, inputs=Inputs(modalities=("optical",)))
    run = tmp_path / "teacher"
    loop.train(optical, run, **SILENT | {"dataset": other})
    later = dataclasses.replace(optical, execution=dataclasses.replace(optical.execution, keep_best=False))
    loop.train(later, run, extend_steps=5, **SILENT | {"dataset": other})
    best = restore_run(run, make_mesh(STUDENT.execution.mesh), say=lambda line: None)
    assert best.checkpoint != "checkpoints/5"
    said = []
    loop.train(STUDENT, tmp_path / "student", teacher=run, dataset=DATA, say=said.append)
    copied = tmp_path / "student" / "teacher"
    assert teachers.describe(copied, "float32").statistics == other.statistics != DATA.statistics
    assert teachers.read_origin(copied)["checkpoint"] == best.checkpoint
    weights = teachers.read_weights(copied / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, weights.params, jax.device_get(best.params))


def test_a_teacher_of_which_only_the_best_is_left(tmp_path):
    optical = toy.config(Supervised(), steps=2, inputs=Inputs(modalities=("optical",)))
    loop.train(optical, tmp_path / "teacher", **SILENT)
    shutil.rmtree(tmp_path / "teacher" / "checkpoints")
    said = []
    options = {"teacher": tmp_path / "teacher", "dataset": DATA, "say": said.append}
    loop.train(toy.config(Distillation(), steps=1), tmp_path / "student", **options)
    assert any(re.search("teacher, best/", line) for line in said)
    assert not any("only, and teaches as it is" in line for line in said), "how far it went is not known"


def test_a_damaged_copy_and_another_teacher_are_named(runs, tmp_path):
    folder, _ = runs
    student = tmp_path / "student"
    for name, harm in (
        ("weights.safetensors", lambda path: path.unlink()),
        ("origin.json", lambda path: path.unlink()),
        ("origin.json", lambda path: path.write_text("{")),
        ("origin.json", lambda path: path.write_text("[]")),
    ):
        shutil.rmtree(student, ignore_errors=True)
        shutil.copytree(folder / "student", student)
        harm(student / "teacher" / name)
        with pytest.raises(UserError, match="student/teacher is damaged"):
            loop.train(STUDENT, student, **SILENT)
    # The copy is gone, and another run is offered in its place; then one that was made of the same configuration.
    shutil.rmtree(student)
    shutil.copytree(folder / "student", student)
    optical = toy.config(Supervised(), steps=3, inputs=Inputs(modalities=("optical",), normalisation="tile"), seed=1)
    loop.train(optical, tmp_path / "another", **SILENT)
    shutil.move(student / "teacher", tmp_path / "away")
    with pytest.raises(UserError, match=r"was taught by another teacher than .* of .*another"):
        loop.train(STUDENT, student, teacher=tmp_path / "another", extend_steps=9, **SILENT)
    assert not (student / "teacher").exists()
    shutil.move(tmp_path / "away", student / "teacher")
    said = []
    shutil.copytree(student / "teacher", tmp_path / "like it")
    shutil.copytree(tmp_path / "another" / "checkpoints", tmp_path / "like it" / "checkpoints")
    loop.train(STUDENT, student, teacher=tmp_path / "like it", dataset=DATA, say=said.append)
    assert any("is a copy of" in line and "goes on teaching" in line for line in said)


def test_a_student_starts_from_its_teachers_decoder(tmp_path):
    """Another sensor's first convolution does not fit; all that comes after it does."""
    optical = toy.config(Supervised(), steps=1, inputs=Inputs(modalities=("optical",)))
    state = loop.train(optical, tmp_path / "teacher", **SILENT)
    said = []
    still = toy.config(Supervised(), steps=1, optimizer=Optimizer(name="sgd", learning_rate=0.0))
    warm = loop.train(still, tmp_path / "warm", init_from=tmp_path / "teacher", dataset=DATA, say=said.append)
    assert any(line.endswith("fresh: encoder/conv1/kernel") for line in said)
    kernel = warm.params["encoder"]["conv1"].pop("kernel")
    assert kernel.shape[2] == 1 != state.params["encoder"]["conv1"].pop("kernel").shape[2]
    jax.tree.map(np.testing.assert_array_equal, warm.params, state.params)
