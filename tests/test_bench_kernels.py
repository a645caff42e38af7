"""The benchmark of kernels: every side computes the same, figures are complete, and what cannot be is refused."""

import json

import numpy as np
import pytest
from verbs import fails, run

from sarjax.bench import kernel_cases, timing
from sarjax.bench.kernels import KERNELS, bench_kernels

pytestmark = pytest.mark.usefixtures("session_devices")
RATES = {"matrix_flops_per_second": 1e11, "copy_bytes_per_second": 1e10}
TINY = {"sinkhorn": 96, "neighbours": 200}
# Of grey values, where a last bit decides the rounding; of moments, of draws; else of the last bits.
APART = {"views": 1.0, "radiometry": 0.05, "sinkhorn": 1e-4, "neighbours": 1e-5}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_cases, "TILE", 32)
    monkeypatch.setattr(kernel_cases, "ITERATIONS", 5)
    monkeypatch.setattr(timing, "rates", lambda: RATES)


@pytest.mark.parametrize("name", KERNELS)
def test_all_sides_compute_the_same(name):
    said = []
    found = bench_kernels([name], sizes=[TINY.get(name, 3)], repetitions=2, say=said.append)
    rows = {row["side"]: row for row in found["rows"]}
    assert next(iter(rows)) == "ours"
    assert {"torch", "pot"} & set(rows)
    for side, row in rows.items():
        if row["seconds"] is None:
            assert not kernel_cases.PEERS[side]
            assert row["difference"] is None
            continue
        assert row["seconds"]["n"] == 2
        assert row["difference"] <= APART.get(name, 0.0), side
        assert row["times_floor"] == pytest.approx(row["seconds"]["median"] / row["floor_seconds"])
        assert row["floor_seconds"] == pytest.approx(max(row["bytes"] / 1e10, row["flops"] / 1e11))
    assert rows["ours"]["times_ours"] == 1
    assert rows["ours"]["difference"] == 0


def test_sides_that_are_not_there_have_no_figures(monkeypatch):
    monkeypatch.setattr(kernel_cases, "PEERS", {"torch": False, "pot": False})
    monkeypatch.setattr(kernel_cases, "LARGEST_MATRIX", 0)
    said = []
    found = bench_kernels(["neighbours"], sizes=[300], repetitions=1, say=said.append)
    there = {row["side"]: row["seconds"] is not None for row in found["rows"]}
    assert there == {"ours": True, "whole matrix": False, "numpy": True, "torch": False}
    assert sum("not installed" in line for line in said) == 1


def test_a_wrong_result_shows():
    case = kernel_cases.confusions(2)
    ours = case.sides["ours"]()
    assert case.difference(ours, np.asarray(ours) + 3) == 3
    case = kernel_cases.neighbours(50)
    table = np.asarray(case.sides["ours"]())
    assert case.difference(table, (table + 1) % 50) > 0.01


def test_one_line(capsys):
    run("bench", "kernels", "confusion", "--sizes", "1", "--repetitions", "1", "--json")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert {row["side"] for row in json.loads(out)["rows"]} == {"ours", "products", "bincount", "numpy", "torch"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("confusions",), "did you mean 'confusion'"),
        (("flips", "views", "--sizes", "8"), "one kernel"),
        (("--sizes", "8"), "one kernel"),
        (("flips", "--sizes", "0"), "size is 0"),
        (("neighbours", "--sizes", "3"), "size is 3"),
        (("flips", "--repetitions", "0"), "repetitions is 0"),
    ],
)
def test_what_cannot_be_is_refused(capsys, arguments, says):
    assert says in fails(capsys, "bench", "kernels", *arguments)
