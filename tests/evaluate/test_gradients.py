"""Pulls of the terms: those of their own gradients, over what they share, in the order of the method."""

import json

import jax
import numpy as np
import pytest
import toy

from sarjax.cli import training
from sarjax.errors import UserError
from sarjax.reports.gradients import report_gradients, summarise
from sarjax.train import loop
from sarjax.train.feed import host_tables, make_batches
from sarjax.train.mesh import make_mesh, put_batch
from sarjax.train.run import restore_run
from sarjax.train.state import keys


@pytest.fixture(scope="module")
def data():
    return toy.dataset()


@pytest.fixture(scope="module")
def taught(tmp_path_factory, data):
    """A run of four terms, one of them from a teacher, and its last state."""
    folder = tmp_path_factory.mktemp("gradients")
    loop.train(toy.config(toy.Toy()), folder / "teacher", dataset=data, say=lambda line: None)
    state = loop.train(
        toy.config(toy.Toy(taught=True)), folder / "run", teacher=folder / "teacher", dataset=data,
        say=lambda line: None,
    )  # fmt: skip
    return folder / "run", state


@pytest.fixture(autouse=True)
def in_memory(monkeypatch, data):
    monkeypatch.setattr("sarjax.reports.training.data_of", lambda *args: data)


def test_pulls_are_the_gradients_of_each_term(taught, data):
    """Against one jax.grad per term, on the same batch with the same draws."""
    from sarjax.methods.record import Rest
    from sarjax.train import teacher as teachers

    run, state = taught
    pulls, path = report_gradients(run, batches=1, say=lambda line: None)
    assert [p.name for p in pulls] == ["main", "partner", "taught", "small"], "the method's order, the main one first"
    assert [p.factor for p in pulls] == pytest.approx([1.0, 0.5, 0.3, 0.01])

    config = toy.config(toy.Toy(taught=True))
    mesh = make_mesh(config.execution.mesh)
    frozen = teachers.load(run, mesh)
    method, _, _ = loop.make_method(config, data, teachers.describe(run / "teacher", "float32"), run, 0)
    batches = make_batches(method, data, config, mesh)
    batches.tables = host_tables(method, state.memory)
    batch = put_batch(mesh, batches[6])
    key = jax.random.fold_in(keys(0)["step"], 6)

    def term(params, name):
        t = method.loss(params, Rest(frozen, state.stats, state.memory), batch, key, 6)[0][name]
        return t.factor * t.total / jax.lax.stop_gradient(t.weight)

    shared = []
    for pull in pulls:
        value, gradient = jax.value_and_grad(term)(state.params, pull.name)
        assert pull.value * pull.factor == pytest.approx(float(value), rel=1e-5)
        # "other" is moved by `partner` alone, the auxiliary's scale by `small` alone: neither is shared.
        moved = [np.ravel(gradient[part]["kernel"]).astype(np.float64) for part in ("encoder", "main")]
        shared.append(np.concatenate(moved))
    sizes = [np.linalg.norm(g) for g in shared]
    assert [p.norm for p in pulls] == pytest.approx(sizes, rel=1e-4)
    cosines = [g @ shared[0] / size / sizes[0] for g, size in zip(shared, sizes, strict=True)]
    assert [p.cosine for p in pulls] == pytest.approx(cosines, abs=1e-4)
    content = json.loads(path.read_text())
    assert content["shared_parameters"] == len(shared[0])
    assert content["checkpoint"] == "checkpoints/6"
    assert [t["norm"] for t in content["terms"]] == [p.norm for p in pulls]


def test_what_moves_nothing_has_no_direction():
    facts = [{"factor": np.ones(3), "value": np.array([v, 1.0, 0.0])} for v in (1.0, 2.0, 9.0)]
    found = np.zeros((3, 2, 3, 3))
    found[:, 0, :2, :2] = [[4.0, -3.0], [-3.0, 9.0]]
    found[:, 1, 0, 0] = 100.0  # moved by one term alone
    pulls, shared = summarise(["a", "b", "c"], facts, found)
    assert shared.tolist() == [True, False]
    assert [(p.value, p.norm, p.cosine) for p in pulls] == [(2.0, 2.0, 1.0), (1.0, 3.0, -0.5), (0.0, 0.0, None)]


def test_on_the_command_line(taught, capsys, monkeypatch):
    run, _ = taught
    monkeypatch.setattr("sarjax.cli.common.devices", lambda host_devices=0: None)
    training.report(run, "gradients", batches=9, checkpoint="best")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("cosine with main")
    assert lines[1].split()[0] == "main"
    assert lines[1].endswith("+1.00")
    assert len(lines) == 5
    step = restore_run(run, make_mesh(toy.config().execution.mesh)).step
    content = json.loads((run / "reports" / "gradients-best.json").read_text())
    assert (content["checkpoint"], content["batches"]) == (f"best/{step}", 9)
    training.report(run, "gradients", batches=1, json=True)
    assert [term["name"] for term in json.loads(capsys.readouterr().out)] == ["main", "partner", "taught", "small"]
    with pytest.raises(UserError, match="--batches is 0"):
        report_gradients(run, batches=0)
