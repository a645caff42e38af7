"""`sarjax bench <verb>`: parse, measure, print one JSON line or a table. What is measured is in `sarjax.bench`."""

import itertools
import json as text
from collections.abc import Sequence
from typing import Any

from sarjax.cli.common import Verb, command, dispatch
from sarjax.cli.deploy import deploy
from sarjax.cli.growth import growth_verb
from sarjax.cli.kernels import kernels
from sarjax.cli.measure import build, input_, start
from sarjax.cli.scene import scene
from sarjax.cli.step import step_verb

VERBS: dict[str, Verb] = {
    "deploy": command("bench deploy", deploy),
    "scene": command("bench scene", scene),
    "step": step_verb,
    "input": command("bench input", input_),
    "build": command("bench build", build),
    "start": command("bench start", start),
    "kernels": command("bench kernels", kernels),
    "growth": growth_verb,
}


def bench_verb(args: Sequence[str]) -> None:
    """Measure: runs as deployed; steps, maps of scenes, input and kernels beside what else there is; what grows"""
    dispatch("sarjax bench", VERBS, args)


def show(found: dict[str, Any], json: bool) -> None:
    """One JSON line, or the facts in a line each and `rows` as a table, one for each `part` where they name theirs.

    A spread, {"median", "min", "max", "n"}, is printed as "median [min, max]"; numbers with four digits.
    """
    if json:
        print(text.dumps(found))
        return
    for name, fact in found.items():
        if name != "rows":
            print(f"{name}: {_cell(fact)}")
    for _, rows in itertools.groupby(found["rows"], key=lambda row: row.get("part")):
        _table(list(rows))


def _table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        return f"{value['median']:.4g} [{value['min']:.4g}, {value['max']:.4g}]"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    return str(value)
