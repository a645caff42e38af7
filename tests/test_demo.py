"""`sarjax demo` from end to end at toy size, and its floor."""

import dataclasses

import numpy as np
import pytest

from sarjax import demo, raster, recipes
from sarjax.config import Mesh


def test_majority():
    confusion = np.array([[5, 1, 0], [2, 10, 3], [0, 0, 0]])
    np.testing.assert_array_equal(demo.majority(confusion), [[0, 6, 0], [0, 15, 0], [0, 0, 0]])
    assert demo.majority(confusion).dtype == confusion.dtype
    np.testing.assert_array_equal(demo.majority(np.zeros((2, 2), int)), np.zeros((2, 2)))


@pytest.fixture
def small():
    """The demo's recipe for two steps of two rows on one device."""
    config = recipes.find("synthetic_sar")
    e = config.experiment
    return dataclasses.replace(
        config,
        experiment=dataclasses.replace(
            e,
            network=dataclasses.replace(e.network, width=0.0625),
            augment=dataclasses.replace(e.augment, crop=64),
            batch_size=2,
            steps=2,
        ),
        execution=dataclasses.replace(config.execution, mesh=Mesh(data=1), tensorboard=False),
    )


def test_demo(small, tmp_path, capsys):
    said = []

    def run():
        capsys.readouterr()
        said.clear()
        demo.run(tmp_path / "demo", scenes=3, size=(512, 256), config=small, say=said.append)
        return capsys.readouterr().out

    first = run()
    rows = {line[:24].strip(): line[24:].split() for line in first.splitlines()[-2:]}
    assert list(rows) == ["the most frequent class", "LANet on SAR"]
    for numbers in rows.values():
        assert len(numbers) == 3
        assert all(-1 <= float(n) <= 1 for n in numbers)
    assert float(rows["the most frequent class"][2]) == 0, "a constant answer has no kappa"
    for name in ("panels.png", "tiles.png", "run/curves.png", "run/eval/test-best.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG"), name
    (map_of,) = (tmp_path / "demo" / "maps").glob("*.tif")
    labels = raster.read(map_of)
    assert labels.shape == (256, 512, 1)
    assert set(np.unique(labels)) <= {*range(7), 255}
    assert map_of.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes()
    assert run() == first
    assert any("trained to its last step" in line for line in said)
    assert any("is built already" in line for line in said)
    assert (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes() == before
