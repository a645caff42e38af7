"""Toy papers, and the runs of one."""

import contextlib
import dataclasses

import pytest
import toy
from toy_tables import TAUGHT, TWO, small

from sarjax import recipes
from sarjax.config import Config, Data, Experiment, Inputs
from sarjax.experiments import reproduce
from sarjax.recipes.tables import TABLES


@contextlib.contextmanager
def known():
    """The toy papers and recipes are known, and a verb does not ask for other devices than the session's."""
    data, method = Data("whu_opt_sar"), toy.Toy(taught=True)
    student = Experiment(data=data, inputs=Inputs(), network=toy.ToyNetwork(), method=method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sarjax.cli.common.devices", lambda host_devices=0: None)
        patch.setitem(TABLES, "two", TWO)
        patch.setitem(TABLES, "taught", TAUGHT)
        patch.setitem(recipes.RECIPES, "toy_student", lambda: Config(experiment=student))
        teacher = dataclasses.replace(student, method=toy.Toy())
        patch.setitem(recipes.RECIPES, "toy_teacher", lambda: Config(experiment=teacher))
        yield


@pytest.fixture(autouse=True, scope="module")
def papers():
    with known():
        yield


@pytest.fixture(scope="session")
def records(fake_records):
    return str(fake_records)


@pytest.fixture(scope="session")
def done(records, tmp_path_factory):
    """Both rows with two seeds, looked at on test where that is allowed: (folder, outcome, what was said)."""
    workdir, said = tmp_path_factory.mktemp("tables"), []
    with known():
        outcome = reproduce(small("two", workdir, seeds=2, data_dir=records, test=True), say=said.append)
    return workdir / "ombria", outcome, said
