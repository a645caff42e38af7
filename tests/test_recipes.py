"""Every recipe fits its data, one of every kind runs, and a preset or another network changes what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verbs import SHRINK, fails, run

from sarjax import recipes
from sarjax.cli import training
from sarjax.config import Inputs, difference
from sarjax.data.pipeline import Batches
from sarjax.data.store import open_dataset
from sarjax.methods import build_method
from sarjax.methods.record import Context, Rest, Schedule, Teacher
from sarjax.options import LANet, PSPNet, Supervised
from sarjax.recipes import tables

pytestmark = pytest.mark.usefixtures("session_devices")


def _kinds():
    """A recipe of every pair of network and method."""
    found = {}
    for name in sorted(recipes.RECIPES):
        e = recipes.find(name).experiment
        found.setdefault((e.network.NAME, e.method.NAME), name)
    return found


TAUGHT = {"dhfa": "dhfa_teacher", "frd": "frd_teacher_r34"}  # method: a recipe of its teacher


@pytest.mark.parametrize("recipe", _kinds().values())
def test_a_recipe_of_every_kind_runs(recipe, fake_records, tmp_path):
    taught, method = (), recipes.find(recipe).experiment.method
    if method.NAME in TAUGHT:
        labels = ("--data.labelled", "0.5") if getattr(method, "pairs", 0) else ()
        run("train", TAUGHT[method.NAME], "--workdir", tmp_path / "teacher", "--data-dir", fake_records, *SHRINK)
        taught = ("--teacher", tmp_path / "teacher", *labels)
    run("train", recipe, "--workdir", tmp_path / "run", "--data-dir", fake_records, *SHRINK, *taught)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"] == recipe


@pytest.mark.parametrize(
    ("recipe", "data"),
    [(name, "") for name in sorted(recipes.RECIPES)]
    + [(name, "ombria") for name in sorted(recipes.RECIPES) if "ombria" in tables.reached(recipes.find(name))[1:]],
)
def test_every_recipe_fits_its_data(recipe, data, fake_records):
    """Traced, not run: networks, inputs, method and labels go together. Its docstring says how it is run."""
    e = training._default(recipe, data, "").experiment
    dataset = open_dataset(e.data.name, e.data.config, str(fake_records))
    e = dataclasses.replace(e, network=dataclasses.replace(e.network, width=0.0625), batch_size=2, steps=2)
    teacher = None
    if e.method.NAME in TAUGHT:
        inputs = dataclasses.replace(Inputs(), modalities=("optical",), by_date=e.inputs.by_date)
        seen = dataclasses.replace(e, inputs=inputs, method=Supervised())
        built = build_method(Context(seen, dataset.spec, dataset.statistics, Schedule(2, 2, 2)))
        teacher = Teacher(built, seen, dataset.spec, dataset.statistics)
    method = build_method(Context(e, dataset.spec, dataset.statistics, Schedule(2, 2, 2), teacher))
    state = jax.eval_shape(method.init, jax.random.key(0))
    frozen = jax.eval_shape(teacher.method.init, jax.random.key(0)) if teacher else None
    neighbours = {s.table: np.full((4096, 3), -1) for s in method.streams.values() if s.kind == "follow"}
    labelled = 1.0 if e.data.labelled == 1 else 0.5  # the fake records are few
    tiles = dataset.split("train")
    batch = Batches(tiles, method.streams, batch_size=2, seed=0, labelled=labelled, tables=neighbours)[0]
    rest = Rest(frozen, state.stats, state.memory)
    terms, _ = jax.eval_shape(method.loss, state.params, rest, batch, jax.random.key(0), jnp.int32(0))
    assert terms
    assert (recipes.RECIPES[recipe].__doc__ or "").count(f"sarjax train {recipe} ") == 1, "says how it is run"


def test_preset_quarters_the_width_and_thirds_the_epochs():
    full, small = recipes.find("ombria_s1"), recipes.find("ombria_s1", "cpu")
    assert small.recipe == "ombria_s1+cpu"
    assert small.experiment.network.width == full.experiment.network.width / 4 == 0.25
    assert small.experiment.epochs == full.experiment.epochs / 3 == 40
    assert difference(full, small) == [
        "recipe: 'ombria_s1' -> 'ombria_s1+cpu'",
        "experiment.network.width: 1.0 -> 0.25",
        "experiment.epochs: 120.0 -> 40.0",
    ]


def test_other_data_than_the_recipes(fake_records, tmp_path, capsys):
    """As tables put a row there."""
    run("train", "synthetic_sar", "--data", "ombria", "--workdir", tmp_path / "a", "--data-dir", fake_records, *SHRINK)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["recipe"] == "synthetic_sar+ombria"
    assert written["experiment"]["inputs"]["date_difference"]
    assert training._default("dhfa_few_student", "ombria", "cpu") == tables.on(
        recipes.find("dhfa_few_student"), "ombria", "cpu"
    )
    assert "did you mean 'ombria'" in fails(capsys, "train", "dhfa_student", "--data", "ombra", "--workdir", tmp_path)
    assert "more than once" in fails(
        capsys, "train", "dhfa_student", "--data=ombria", "--data", "ombria", "--workdir", tmp_path / "b"
    )
    assert "unknown data ''" in fails(capsys, "train", "dhfa_student", "--workdir", tmp_path, "--data")
    again = fails(capsys, "train", tmp_path / "a" / "config.json", "--data", "ombria", "--workdir", tmp_path / "b")
    assert "takes none" in again
    for data in ("whu_opt_sar", "synthetic"):
        wrong = fails(capsys, "train", "ombria_s1", "--data", data, "--workdir", tmp_path / "b")
        assert f"'ombria_s1' is of ombria, and cannot be put on {data}: ombria would be accepted" in wrong
    assert "needs --data-dir" in fails(
        capsys, "train", "cheng_lanet", "--data", "synthetic", "--workdir", tmp_path / "b"
    )
    assert not (tmp_path / "b").exists()


def test_another_network_or_method_than_the_recipes(tmp_path, capsys):
    default = recipes.find("dhfa_student", "cpu")
    config, rest = training._exchanged(default, "network", ["--workdir", "w", "--network", "lanet", "--seed", "1"])
    assert config.experiment.network == LANet(width=0.25)
    assert rest == ["--workdir", "w", "--seed", "1"]
    assert dataclasses.replace(config.experiment, network=default.experiment.network) == default.experiment
    assert training._exchanged(default, "network", ["--network=lanet"])[0].experiment.network == LANet(width=0.25)
    config, rest = training._exchanged(default, "method", ["--method", "supervised"])
    assert (config.experiment.method, rest) == (Supervised(dice=1.0), [])
    config, _ = training._exchanged(default, "network", ["--network", "pspnet"])
    assert config.experiment.network == PSPNet(encoder="resnet18", width=0.25), "channels mean something else there"
    assert training._exchanged(default, "method", ["--method.dice", "2"]) == (default, ["--method.dice", "2"])
    assert "did you mean 'lanet'" in fails(capsys, "train", "dhfa_student", "--network", "lanat", "--workdir", tmp_path)
    assert "unknown method ''" in fails(capsys, "train", "dhfa_student", "--workdir", tmp_path, "--method")
