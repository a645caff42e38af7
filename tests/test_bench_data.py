"""`sarjax bench input` and `build`, tiny: complete results, and a peer that reads the same tiles."""

import json
import sys

import numpy as np
import pytest
from verbs import fails, run

from sarjax.bench import input as inputs
from sarjax.bench.apart import Apart
from sarjax.bench.build import bench_build
from sarjax.data.build import build
from sarjax.data.store import open_directory
from sarjax.data.synthesis import synthesize
from sarjax.errors import UserError

SIZE = (1024, 512)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of scenes, their tiles, where these lie)."""
    root = tmp_path_factory.mktemp("made")
    source = synthesize(root / "scenes", 1, SIZE)
    dataset = open_directory(build("whu_opt_sar", source, root / "zstd", "random_tile"))
    return source, list(dataset.split("train")), inputs._cuts(dataset)


@pytest.mark.parametrize("kind", inputs.PEERS)
def test_a_peer_reads_the_same_tiles(made, tmp_path, kind):
    pytest.importorskip("torch")
    from sarjax.bench.torch_input import Windows

    source, tiles, cuts = made
    inputs._cut(source, tmp_path, cuts, inputs.SENSORS)
    windows = Windows(tmp_path if kind == "tiles" else source, kind == "tiles", cuts, 1, inputs.SENSORS, 1)
    images = {name: np.stack([tile[name][0] for tile in tiles]) for name in inputs.SENSORS}
    labels = np.stack([tile["label"] for tile in tiles])
    ours = inputs.checksums(np.arange(len(tiles)), images, labels)
    assert windows("sums") == ours
    assert len(set(ours.values())) == len(tiles) > 2
    assert windows("seconds") > 0
    images["sar"][0, 0, 0] ^= 1
    assert windows("sums") != inputs.checksums(np.arange(len(tiles)), images, labels)


def test_sides_that_differ_are_refused():
    sides = {("sarjax", "zstd", 1): lambda what: {0: 5, 1: 6}, ("torch", "scenes", 1): lambda what: {1: 7}}
    with pytest.raises(UserError, match=r"torch \(scenes\) finds another tile 1 than sarjax \(zstd\)"):
        inputs._check(sides)


def test_input(tmp_path, monkeypatch, capsys):
    """On one core and without torch, whose figures are then null."""
    found = inputs.importlib.util.find_spec
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    monkeypatch.setattr(inputs, "visible_cores", lambda: 1)
    asked = ["--scenes", 1, "--size", "1024x512", "--batch", 2, "--repetitions", 2, "--folder", tmp_path]
    run("bench", "input", *asked, "--json")
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    result = json.loads(line)
    assert err.count("torch is not installed") == 1
    rows = {(row["side"], row["from"]): row for row in result["rows"]}
    assert set(rows) == {
        *(("sarjax", name) for name in inputs.COMPRESSIONS),
        *(("torch", name) for name in inputs.PEERS),
    }
    for (side, name), row in rows.items():
        if side == "torch":
            assert row["seconds"] is None
            continue
        assert row["seconds"]["n"] == 2
        assert row["tiles_per_second"] == row["tiles_per_second_per_core"] == pytest.approx(
            len(open_directory(tmp_path / name / "whu_opt_sar/random_tile/1.0.0").split("train")) // 2 * 2
            / row["seconds"]["median"]
        )  # fmt: skip
    assert rows["sarjax", "none"]["bytes_of_a_tile"] > rows["sarjax", "zstd"]["bytes_of_a_tile"] > 0
    assert rows["sarjax", "zstd"]["times_ours"] == 1
    with pytest.raises(UserError, match="there are 6 tiles, fewer than a batch of 64"):
        inputs.bench_input(scenes=1, size=SIZE, batch=64, peers=(), folder=tmp_path)
    assert "repetitions is 0" in fails(capsys, "bench", "input", *asked, "--repetitions", 0)
    assert "--size is 'big'" in fails(capsys, "bench", "input", "--size", "big")


def test_build(tmp_path, capsys):
    said = []
    found = bench_build(scenes=(1,), size=(512, 256), jobs=(1,), repetitions=1, folder=tmp_path, say=said.append)
    (row,) = found["rows"]
    assert (row["scenes"], row["jobs"], row["seconds"]["n"]) == (1, 1, 1)
    assert row["seconds_per_scene"] == row["seconds"]["median"] > row["records_seconds"] > 0
    assert row["peak_mib"] > 20
    assert row["records_mib"] > 0.5
    assert len([line for line in said if line.startswith("building")]) == 2  # one does not count
    assert [p.name for p in tmp_path.iterdir()] == ["scenes-1"]
    assert "repetitions is 0" in fails(capsys, "bench", "build", "--repetitions", 0)
    for scenes, jobs, what in (((0,), (1,), "at least 1 scene"), ((1,), (0,), "jobs is 0")):
        with pytest.raises(UserError, match=what):
            bench_build(scenes=scenes, size=(512, 256), jobs=jobs, folder=tmp_path, say=said.append)


def test_a_process_that_fails_or_dies(tmp_path):
    with Apart(open_directory, tmp_path) as side, pytest.raises(UserError, match="holds no built data set"):
        side()
    with Apart(sys.exit, 3) as side, pytest.raises(UserError, match="ended with exit code 3"):
        side()
