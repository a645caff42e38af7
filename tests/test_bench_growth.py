"""The benchmark of growth: lines through what the compiler says, the least that is sent, exponents, and refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy
from verbs import fails, run

from sarjax.bench import growth as bench
from sarjax.bench.growth import PARTS, Ranges, bench_growth
from sarjax.data.declared import Described
from sarjax.errors import UserError
from sarjax.methods.neighbours import ROWS
from sarjax.options import Clustering, SceneClustering
from sarjax.train.plan import Asked, plan

pytestmark = pytest.mark.usefixtures("session_devices")
DATA = Described(toy.SPEC, toy.dataset().statistics, (32, 32))
TINY = Ranges(
    batches=(1, 2, 4), sizes=(32, 64), shards=(1, 8), devices=(1, 8), memories=(0.001, 0.05), tables=(100, ROWS + 1),
    tiles=(3, 12), scenes=(1, 2),
)  # fmt: skip


def measured(*parts, experiment=None, **ranges):
    found = bench_growth(
        experiment or toy.config(network=toy.FCN(width=2.0, stages=1)).experiment,
        DATA,
        parts=parts,
        ranges=dataclasses.replace(TINY, **ranges),
        repetitions=1,
        say=lambda line: None,
    )
    assert {row["part"] for row in found["rows"]} == set(parts)
    return found


def test_memory_grows_along_a_line():
    found = measured("batch", "size", experiment=toy.config().experiment)
    rows = [row for row in found["rows"] if row["part"] == "batch"]
    assert [row["rows"] for row in rows] == [1, 2, 4]
    assert len({row["state_bytes"] for row in rows}) == 1
    fit = found["fits"]["batch"]
    for row in rows:
        line = fit["peak_bytes_fixed"] + fit["peak_bytes_each"] * row["rows"]
        assert line / row["peak_bytes"] - 1 == pytest.approx(row["line_off"])
        assert abs(row["line_off"]) <= fit["line_off_at_most"] < 0.2
    small, large = (row["peak_bytes"] for row in found["rows"] if row["part"] == "size")
    assert small < large < 4 * small


def test_what_is_cut_is_smaller_and_sent():
    rows = {(row["data"], row["fsdp"]): row for row in measured("fsdp", "devices")["rows"]}
    assert rows.keys() == {(1, 1), (8, 1), (1, 8)}
    alone, whole, cut = rows[1, 1], rows[8, 1], rows[1, 8]
    assert alone["sent_bytes"] == 0
    assert alone["times_least"] is None
    assert whole["state_bytes"] == alone["state_bytes"] > 2 * cut["state_bytes"]
    assert cut["gathered_bytes"] == cut["cut_bytes"] > 0 == whole["gathered_bytes"]
    assert cut["rows_moved_bytes"] == whole["rows_moved_bytes"] == 0
    assert set(whole["collectives"]) == {"all-reduce"}
    assert 1 <= whole["times_least"] < 1.1
    assert 1 < cut["times_least"] < 1.6, "host devices sum gradients whole before they are cut"


def test_the_largest_batch_fills_a_device():
    found = measured("largest")
    none, some = found["rows"]
    assert none["largest_batch"] == 0
    assert none["peak_bytes"] is None
    assert some["largest_batch"] > 4
    assert some["share"] == pytest.approx(some["peak_bytes"] / (0.05 * 2**30))
    assert 0.9 < some["share"] <= 1
    experiment = toy.config(network=toy.FCN(width=2.0, stages=1), batch_size=4).experiment
    kind = bench.KINDS["h100"]._replace(memory=0.05 * 2**30, usable=1.0)
    known = plan(Asked(experiment, DATA, {"data": 1, "fsdp": 1, "space": 1}, kind), limit=1, say=lambda line: None)
    assert abs(some["planned_batch"] - known["largest_batch"]["batch"]) <= 1, "but for rounding"


def test_seconds_against_tiles():
    experiment = toy.config(SceneClustering(clustering=Clustering(neighbours=2))).experiment
    found = measured("neighbours", "refresh", experiment=experiment)
    by = {name: [row for row in found["rows"] if row["part"] == name] for name in ("neighbours", "refresh")}
    assert [row["tiles"] for row in by["neighbours"]] == [100, ROWS + 1]
    assert [row["tiles"] for row in by["refresh"]] == [3, 12]
    for name, rows in by.items():
        assert all(row["seconds"]["n"] == 1 and row["seconds"]["median"] > 0 for row in rows)
        points = np.log([(row["tiles"], row["seconds"]["median"]) for row in rows])
        assert found["fits"][name]["exponent"] == pytest.approx(np.diff(points[:, 1])[0] / np.diff(points[:, 0])[0])


def test_exponents_and_lines_of_what_is_known():
    rows = [{"tiles": n, "seconds": {"median": 3.0 * n**2}} for n in (1, 2, 4, 8)]
    assert bench._exponent(rows, "tiles") == pytest.approx(2)
    rows = [{"tiles": n, "seconds": {"median": 5.0 + 2 * n}} for n in (1, 2, 4, 8)]
    fit = bench._line(rows, "tiles", "seconds")
    assert fit["seconds_each"] == pytest.approx(2)
    assert fit["seconds_fixed"] == pytest.approx(5)
    assert fit["line_off_at_most"] < 1e-9
    assert bench._line(rows[:1], "tiles", "seconds") == {}


def test_a_method_that_keeps_nothing_is_not_refreshed():
    said = []
    experiment = toy.config().experiment
    found = bench_growth(experiment, DATA, parts=("refresh",), ranges=TINY, repetitions=1, say=said.append)
    assert found["rows"] == []
    assert "left out" in said[-1]


def test_records_are_built(monkeypatch):
    monkeypatch.setattr(bench, "SCENE", 512)
    rows = measured("build")["rows"]
    assert [row["tiles"] for row in rows] == [4, 8]


def test_one_line(capsys):
    run("bench", "growth", "--parts", "neighbours", "--along.tables", "50", "--repetitions", "1", "--json")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    assert found["recipe"] == "cheng_lanet"
    assert [row["tiles"] for row in found["rows"]] == [50]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--parts", "batches"), "did you mean 'batch'"),
        (("--parts", "neighbours", "--along.tables", "0"), "tables is (0,)"),
        (("--size", "0"), "--size is 0"),
        (("--repetitions", "0"), "repetitions is 0"),
        (("nothing",), "unknown recipe"),
    ],
)
def test_what_cannot_be_is_refused(capsys, arguments, says):
    assert says in fails(capsys, "bench", "growth", *arguments)


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match="devices are asked for"):
        measured("devices", devices=(2 * jax.device_count(),))


def test_parts_are_methods():
    assert all(callable(getattr(bench._Growth, name)) for name in PARTS)
