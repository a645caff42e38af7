"""`sarjax demo` from end to end at toy size, and its floor."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from sarjax import cli, demo, raster, recipes
from sarjax.config import difference
from sarjax.signals import Stopped


def test_majority():
    confusion = np.array([[5, 1, 0], [2, 10, 3], [0, 0, 0]])
    np.testing.assert_array_equal(demo.majority(confusion), [[0, 6, 0], [0, 15, 0], [0, 0, 0]])
    assert demo.majority(confusion).dtype == confusion.dtype
    np.testing.assert_array_equal(demo.majority(np.zeros((2, 2), int)), np.zeros((2, 2)))


@pytest.fixture
def small():
    """The demo's recipes for two steps of two rows, which two of the session's eight devices can share."""

    def shrunk(config):
        e = config.experiment
        return dataclasses.replace(
            config,
            experiment=dataclasses.replace(
                e,
                data=dataclasses.replace(e.data, labelled=0.5),
                network=dataclasses.replace(e.network, width=0.0625),
                augment=dataclasses.replace(e.augment, crop=64),
                batch_size=2,
                steps=2,
            ),
            execution=dataclasses.replace(config.execution, tensorboard=False),
        )

    return {job: shrunk(recipes.find(f"demo_{job}")) for job in demo.JOBS}


def test_the_jobs_differ_in_what_they_see_and_who_teaches():
    """Same labels, same steps, same network: a fair comparison."""
    teacher, alone, student = (recipes.find(f"demo_{job}").experiment for job in demo.JOBS)
    assert {line.split(".")[0].split(":")[0] for line in difference(alone, student)} == {"method"}
    assert (alone.method.dice, alone.data, alone.steps) == (student.method.dice, student.data, student.steps)
    assert {line.split(".")[0].split(":")[0] for line in difference(alone, teacher)} == {"inputs"}
    assert student.inputs.modalities == ("sar",)
    assert 0 < student.data.labelled < 1


def test_a_stop_in_the_first_job_starts_no_other(small, tmp_path, monkeypatch, capsys):
    """Nobody is taught by a network that is half trained, and the test split is not looked at."""
    monkeypatch.setattr("sarjax.train.stop.StopFlag.requested", lambda self, step: step == 1)
    with pytest.raises(Stopped):
        demo.run(tmp_path / "demo", scenes=3, size=(256, 256), configs=small, say=lambda line: None)
    assert not (tmp_path / "demo" / "alone").exists()
    assert not (tmp_path / "demo" / "teacher" / "eval").exists()
    monkeypatch.setattr("sarjax.demo.run", lambda *args, **kwargs: (_ for _ in ()).throw(Stopped))
    monkeypatch.setattr("sarjax.cli.common.devices", lambda host_devices=0: None)
    with pytest.raises(SystemExit) as e:
        cli.demo(tmp_path)
    assert e.value.code == 143
    assert "goes on from there" in capsys.readouterr().err


def test_demo(small, tmp_path, capsys):
    said = []

    def run():
        capsys.readouterr()
        said.clear()
        demo.run(tmp_path / "demo", scenes=3, size=(512, 256), configs=small, say=said.append)
        return capsys.readouterr().out

    first = run()
    taught_by = json.loads((tmp_path / "demo" / "student" / "teacher" / "origin.json").read_text())
    assert Path(taught_by["run"]) == tmp_path / "demo" / "teacher"
    rows = {line[:34].strip(): line[34:].split() for line in first.splitlines()[-4:]}
    assert list(rows) == list(demo.TITLES.values())
    for numbers in rows.values():
        assert len(numbers) == 3
        assert all(-1 <= float(n) <= 1 for n in numbers)
    assert float(rows["the most frequent class"][2]) == 0, "a constant answer has no kappa"
    for name in ("panels.png", "tiles.png", "student/curves.png", "alone/eval/test-best.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG"), name
    (map_of,) = (tmp_path / "demo" / "maps").glob("*.tif")
    labels = raster.read(map_of)
    assert labels.shape == (256, 512, 1)
    assert set(np.unique(labels)) <= {*range(7), 255}
    assert map_of.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "demo" / "student" / "metrics.jsonl").read_bytes()
    assert run() == first
    assert sum("trained to its last step" in line for line in said) == 3
    assert any("is built already" in line for line in said)
    assert (tmp_path / "demo" / "student" / "metrics.jsonl").read_bytes() == before
