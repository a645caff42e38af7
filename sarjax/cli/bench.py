"""`sarjax bench <verb>`: parse, measure, print one JSON line or a table. What is measured is in `sarjax.bench`."""

import json as text
from collections.abc import Sequence
from typing import Any

from sarjax.cli.common import Verb, command, dispatch
from sarjax.cli.deploy import deploy
from sarjax.cli.scene import scene
from sarjax.cli.step import step_verb

VERBS: dict[str, Verb] = {
    "deploy": command("bench deploy", deploy),
    "scene": command("bench scene", scene),
    "step": step_verb,
}


def bench_verb(args: Sequence[str]) -> None:
    """Measure: a run as it is deployed, and training steps and maps of scenes beside PyTorch's"""
    dispatch("sarjax bench", VERBS, args)


def show(found: dict[str, Any], json: bool) -> None:
    """One JSON line, or the facts in a line each and `rows` as a table.

    A spread, {"median", "min", "max", "n"}, is printed as "median [min, max]"; numbers with four digits.
    """
    if json:
        print(text.dumps(found))
        return
    for name, fact in found.items():
        if name != "rows":
            print(f"{name}: {_cell(fact)}")
    columns = list(dict.fromkeys(name for row in found["rows"] for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in found["rows"])]
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
