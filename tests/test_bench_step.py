"""The benchmark of a step: both sides take the same one, and what cannot be compared is refused."""

import dataclasses
import json
import math

import jax
import pytest
from verbs import fails, run

from sarjax.bench import step as bench
from sarjax.config import Mesh
from sarjax.data.declared import declared
from sarjax.errors import UserError
from sarjax.methods import build_method
from sarjax.methods.record import Context, Schedule, Teacher
from sarjax.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("session_devices")
SHRINK = ("--network.width", "0.0625", "--batch-size", "2", "--size", "64", "--repetitions", "1", "--mesh.data", "1")


def small(recipe, tiles=2, slower=1):
    """A recipe's experiment for a few tiles of 64 pixels, and what it is trained on. slower: divides its rate."""
    e = RECIPES[recipe]().experiment
    network = dataclasses.replace(e.network, width=0.125)
    optimizer = dataclasses.replace(e.optimizer, learning_rate=e.optimizer.learning_rate / slower)
    e = dataclasses.replace(e, batch_size=tiles, network=network, optimizer=optimizer)
    return e, declared(e.data.name)._replace(tile=(64, 64))


def teacher(experiment, data):
    context = Context(experiment, data.spec, data.statistics, Schedule(1, 1, 1))
    return Teacher(build_method(context, for_inference=True), experiment, data.spec, data.statistics)


def test_ours_alone(capsys):
    run("bench", "step", "cheng_lanet", *SHRINK, "--no-torch", "--json")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    (row,) = found["rows"]
    assert row["side"] == "ours"
    assert row["tiles_per_second"] == pytest.approx(2 / row["seconds"]["median"])
    assert row["seconds"]["n"] == 1
    assert math.isfinite(row["first_loss"])
    assert found["roofline_seconds"] == pytest.approx(
        max(found["flops"] / found["matrix_flops_per_second"], found["bytes"] / found["copy_bytes_per_second"])
    )
    assert found["mesh"] == {"data": 1, "fsdp": 1, "space": 1}


def test_as_a_table(capsys):
    run("bench", "step", "cheng_lanet", *SHRINK, "--no-torch")
    assert "side  tiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "with_teacher", "changes"),
    [
        ("cheng_lanet", "", {}),
        # Its pyramid normalises means of images: of two tiles' loss the last bits of the weights change 4e-5, and of
        # what a long step makes of it a tenth.
        ("cheng_deeplabv3", "", {"tiles": 8, "slower": 100}),
        ("dhfa_student", "dhfa_teacher", {}),
        ("dllr", "", {}),
    ],
)
def test_both_sides_take_the_same_step(recipe, with_teacher, changes):
    pytest.importorskip("torch", reason="torch is not installed: pip install '.[bench]'")
    from sarjax.bench.torch_step import TorchStep

    e, data = small(recipe, **changes)
    taught = teacher(small(with_teacher)[0], data) if with_teacher else None
    e = bench.without_draws(e)
    method = bench.planned_method(e, data, taught)[0]
    ours = bench.Ours(e, data, bench.make_mesh(Mesh(), jax.devices()[:1]), method, taught)
    theirs = TorchStep(e, ours.peer_arguments(), compiled=False)
    first = theirs.step()
    assert first == pytest.approx(ours.first, rel=1e-5)
    # The second loss has the first update in it: gradient, decay and rate.
    second, after = theirs.step(), ours.step()
    assert abs(after - first) > 1e-4 * abs(first)
    assert second == pytest.approx(after, rel=0, abs=0.05 * abs(after - first))


def test_sides_that_differ_are_not_compared(monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed: pip install '.[bench]'")
    from sarjax.bench import objectives

    e, data = small("cheng_lanet")
    monkeypatch.setattr(objectives, "cross_entropy", lambda logits, label: 2 * logits.mean())
    with pytest.raises(UserError, match="do not compute the same"):
        bench.bench_step(e, data, mesh=Mesh(1), repetitions=1, peers=("torch",), say=lambda line: None)


def test_a_narrower_student_has_no_peer():
    e, data = small("dhfa_student")
    wide = small("dhfa_teacher")[0]
    wide = dataclasses.replace(wide, network=dataclasses.replace(wide.network, width=0.25))
    e = bench.without_draws(e)
    taught = teacher(wide, data)
    ours = bench.Ours(
        e, data, bench.make_mesh(Mesh(), jax.devices()[:1]), bench.planned_method(e, data, taught)[0], taught
    )
    with pytest.raises(UserError, match=r"hfdm.*--no-torch"):
        ours.peer_arguments()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "needs a recipe"),
        (("cheng_lanet", "--size", "0"), "--size is 0"),
        (("cheng_lanet", "--batch-size", "0"), "batch_size is 0"),
        (("cheng_lanet", *SHRINK, "--repetitions", "0", "--no-torch"), "repetitions is 0"),
        (("nothing",), "nothing"),
    ],
)
def test_what_cannot_be_is_refused(capsys, arguments, says):
    assert says in fails(capsys, "bench", "step", *arguments).splitlines()[-1]
