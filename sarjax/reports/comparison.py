"""Rows of a table side by side: seeds aggregated, beside the figures of a paper, minus a baseline; and as Markdown.

`compare` makes plain JSON values of evaluations, `markdown` makes text of those alone.
"""

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from sarjax.errors import unknown
from sarjax.evaluate import bootstrap
from sarjax.evaluate.evaluator import Evaluation
from sarjax.evaluate.metrics import PER_CLASS, Metrics
from sarjax.recipes.tables import Table
from sarjax.spec import DatasetSpec

RESAMPLING: dict[str, Any] = {"resamples": 2000, "percentiles": (2.5, 97.5), "seed": 0}
Intervals = MutableMapping[str, list[float | None]]


class Result(NamedTuple):
    """One run's evaluation on a split, and the digest of the file that holds it."""

    evaluation: Evaluation
    digest: str


# {row: {seed: result}} of one split.
Results = Mapping[str, Mapping[int, Result]]

_SCALARS: dict[str, Callable[[Metrics], float]] = {
    "pixel_accuracy": lambda m: m.oa,
    "kappa": lambda m: m.kappa,
    "fwiou": lambda m: m.fwiou,
    "miou": lambda m: m.macro["iou"],
    "macro_precision": lambda m: m.macro["precision"],
    "macro_recall": lambda m: m.macro["recall"],
    "macro_f1": lambda m: m.macro["f1"],
}


POOLED, UNPOOLED = PER_CLASS, ("ap", "tile_mean_iou", "tile_mean_f1")  # of a class: "iou/water"


def metric_of(name: str, spec: DatasetSpec) -> Callable[[Evaluation], float]:
    """The function of an evaluation that `Evaluation.scalars` calls `name`.

    Those of a class ("iou/<class>", "f1/", "precision/", "recall/", "ap/", "tile_mean_iou/", "tile_mean_f1/") are nan
    where `spec` has no such class. UserError for another name.
    """
    kind, _, of = name.partition("/")
    if of and kind in (*POOLED, *UNPOOLED):
        if of not in spec.class_names:
            return lambda evaluation: math.nan
        index = spec.class_names.index(of)
        if kind == "ap":
            return lambda evaluation: float(evaluation.average_precision()[index])
        if kind in UNPOOLED:
            return lambda evaluation: float(getattr(evaluation.tile_mean(), kind.removeprefix("tile_mean_"))[index])
        return lambda evaluation: float(getattr(evaluation.metrics(spec), kind)[index])
    if name == "map":
        return lambda evaluation: evaluation.mean_average_precision(spec)
    if name not in _SCALARS:
        raise unknown("metric", name, [*_SCALARS, "map", *(f"{kind}/<class>" for kind in (*POOLED, *UNPOOLED))])
    return lambda evaluation: _SCALARS[name](evaluation.metrics(spec))


def has_interval(name: str) -> bool:
    """Whether a metric is a function of the pooled confusion matrix, which is what the bootstrap resamples."""
    return name != "map" and name.partition("/")[0] not in UNPOOLED


def compare(table: Table, results: Results, spec: DatasetSpec, same_data: bool, known: Intervals) -> dict[str, Any]:
    """What a table says of one split, as JSON values; what is undefined is None.

    {"rows": {row: {metric: {"values": {seed: v}, "mean", "sd", "n", "paper", "delta", "minus_baseline"}}}, "orders"}.
    sd: sample standard deviation over seeds, from two on. delta: mean - paper, on the paper's own data only.
    minus_baseline: of the seeds that both rows have, {"value", "low", "high", "seeds"}: a paired bootstrap over tiles;
    average precision and means over tiles have no interval.

    results: by row and seed; rows without any are left out. same_data: whether the paper's figures are of this data.
    known: intervals (low, high) that were computed before, by what they are of and how; new ones are added.
    """
    rows: dict[str, Any] = {}
    for row in table.rows:
        if results.get(row.name):
            rows[row.name] = {
                name: _cell(table, row.name, name, results, spec, row.paper.get(name), same_data, known)
                for name in table.metrics
            }
    printed = {row.name: row.paper for row in table.rows}
    return {"rows": rows, "orders": list(orders(printed, rows, table.metrics))}


def _cell(
    table: Table,
    row: str,
    name: str,
    results: Results,
    spec: DatasetSpec,
    paper: float | None,
    same_data: bool,
    known: Intervals,
) -> dict[str, Any]:
    metric = metric_of(name, spec)
    values = {seed: _plain(metric(r.evaluation)) for seed, r in sorted(results[row].items())}
    defined = [v for v in values.values() if v is not None]
    mean = statistics.fmean(defined) if defined else None
    cell: dict[str, Any] = {
        "values": {str(seed): v for seed, v in values.items()},
        "mean": mean,
        "sd": statistics.stdev(defined) if len(defined) > 1 else None,
        "n": len(defined),
        "paper": paper,
        "delta": mean - paper if same_data and mean is not None and paper is not None else None,
        "minus_baseline": None,
    }
    theirs = results.get(table.baseline, {})
    seeds = [seed for seed in values if seed in theirs]
    if row != table.baseline and seeds and mean is not None:
        pairs = [results[row][s] for s in seeds], [theirs[s] for s in seeds]
        ours, baseline = (statistics.fmean(metric(r.evaluation) for r in side) for side in pairs)
        low, high = _interval(pairs, name, metric, known)
        cell["minus_baseline"] = {"value": _plain(ours - baseline), "low": low, "high": high, "seeds": seeds}
    return cell


def _interval(
    pairs: tuple[list[Result], list[Result]], name: str, metric: Callable[[Evaluation], float], known: Intervals
) -> list[float | None]:
    """The bootstrap of two rows' runs, seed by seed; looked up where it was computed before: it takes seconds."""
    how = json.dumps([bootstrap.VERSION, RESAMPLING])
    of = "|".join([how, name, *("+".join(r.digest for r in side) for side in pairs)])
    key = hashlib.sha256(of.encode()).hexdigest()[:24]
    if key not in known:
        if not has_interval(name) or any(math.isnan(metric(r.evaluation)) for side in pairs for r in side):
            known[key] = [None, None]
        else:
            a, b = ([r.evaluation.per_tile for r in side] for side in pairs)
            _, low, high = bootstrap.paired_bootstrap(a, b, lambda c: metric(Evaluation(c, {})), **RESAMPLING)
            known[key] = [_plain(low), _plain(high)]
    return list(known[key])


def orders(
    printed: Mapping[str, Mapping[str, float]], rows: Mapping[str, Any], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Per metric that the paper prints: the rows in the paper's order, in the order seen, and how many pairs agree."""
    for name in names:
        ours = {row: cells[name]["mean"] for row, cells in rows.items() if cells[name]["mean"] is not None}
        paper = {row: printed[row][name] for row in ours if name in printed[row]}
        if len(paper) < 2:
            continue
        pairs = [(a, b) for a, b in itertools.combinations(paper, 2) if paper[a] != paper[b]]
        agree = sum((paper[a] < paper[b]) == (ours[a] < ours[b]) and ours[a] != ours[b] for a, b in pairs)
        yield {
            "metric": name,
            "paper": _ascending(paper),
            "seen": _ascending({row: ours[row] for row in paper}),
            "pairs": len(pairs),
            "pairs_in_the_papers_order": agree,
        }


def _ascending(values: Mapping[str, float]) -> str:
    text, last = "", None
    for row, value in sorted(values.items(), key=lambda item: item[1]):
        text += f"{'' if last is None else ' = ' if value == last else ' < '}{row}"
        last = value
    return text


def _plain(x: float | None) -> float | None:
    return float(x) if x is not None and math.isfinite(x) else None


def markdown(document: Mapping[str, Any]) -> str:
    """The document that `sarjax reproduce` writes as JSON, for people."""
    return "\n".join(_lines(document)) + "\n"


def _lines(d: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {d['paper']} on {d['data']}"
    yield ""
    yield f"Made by `{d['command']}`; data: {d['about']}."
    for line in d["records"]:
        yield f"- records: {line}"
    for line in d["machines"]:
        yield f"- {line}"
    yield f"- preset: {d['preset'] or 'none'}; seeds: as counted below"
    if d["setting"]:
        yield "- the baseline's recipe is changed by the data and the preset, and so are all rows:"
        yield from (f"    - `{line}`" for line in d["setting"])
    else:
        yield "- all rows run as their recipes say"
    yield ""
    low, high = RESAMPLING["percentiles"]
    yield (
        f"Mean ± sample standard deviation over seeds. In brackets: {high - low:g} % of {RESAMPLING['resamples']:,} "
        "resamples of tiles, the same tiles for the row and the baseline, each row's metric being the mean over the "
        "seeds that both have: what other tiles would have given, not what other seeds would; average precision (ap, "
        "map) and means over tiles have none. The checkpoint is the best on val by mIoU, so val figures are a little "
        "too good. Only "
        f"{_listed(d['tested'])} may be looked at on test; every look is in the run's manifest."
    )
    for failure, text in d["failures"].items():
        yield ""
        yield f"**{failure} failed**: {text}"
    for text in d["left_out"]:
        yield ""
        yield f"Left out: {text}"
    for table in d["tables"]:
        yield ""
        yield f"## {table['name']}: {table['title']}"
        yield ""
        if table["source"]:
            yield f"Source of the printed figures: {table['source']} ({table['figures_of']})."
        if table["note"]:
            yield table["note"]
        if not table["splits"]:
            yield ""
            yield "Nothing is evaluated yet."
        for split, found in table["splits"].items():
            yield from _split_lines(table, split, found)
    yield ""
    yield "## Rows"
    yield ""
    yield "| row | recipe | differs from the baseline in | seeds | parameters | seconds a run |"
    yield "|---|---|---|---|---|---|"
    for name, row in d["rows"].items():
        differs = "<br>".join(f"`{line}`" for line in row["differs"]) or "-"
        parameters = "-" if row["parameters"] is None else f"{row['parameters']:,}"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        yield f"| {name} | `{row['recipe']}` | {differs} | {_listed(row['seeds'])} | {parameters} | {seconds} |"


def _split_lines(table: Mapping[str, Any], split: str, found: Mapping[str, Any]) -> Iterator[str]:
    names, rows = table["metrics"], found["rows"]
    yield ""
    yield f"### {split}"
    yield ""
    yield from _table(
        ["row", "seeds", *names],
        [
            [row, str(max(c["n"] for c in cells.values())), *(_mean(cells[n]) for n in names)]
            for row, cells in rows.items()
        ],
    )
    printed = [n for n in names if any(cells[n]["paper"] is not None for cells in rows.values())]
    if printed:
        same, of = table["same_data"], table["figures_of"]
        where = "split (ours minus it):" if same else f"split of {of}: other data, so no difference is taken:"
        yield f"As printed, on the paper's own {where}"
        yield ""
        cell = _beside_paper if same else (lambda c: _number(c["paper"]))
        yield from _table(["row", *printed], [[row, *(cell(cells[n]) for n in printed)] for row, cells in rows.items()])
    others = {row: cells for row, cells in rows.items() if any(c["minus_baseline"] for c in cells.values())}
    if others:
        yield f"Minus `{table['baseline']}`:"
        yield ""
        yield from _table(
            ["row", "pairs", *names],
            [
                [row, str(max(len(c["minus_baseline"]["seeds"]) for c in cells.values() if c["minus_baseline"]))]
                + [_minus(cells[n]["minus_baseline"]) for n in names]
                for row, cells in others.items()
            ],
        )
    for order in found["orders"]:
        yield (
            f"- {order['metric']}: printed {order['paper']}; seen {order['seen']}; "
            f"{order['pairs_in_the_papers_order']} of {order['pairs']} pairs in the printed order"
        )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(h.replace('_', ' ') if i else h for i, h in enumerate(head))} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _mean(cell: Mapping[str, Any]) -> str:
    return _number(cell["mean"]) + ("" if cell["sd"] is None else f" ± {cell['sd']:.4f}")


def _beside_paper(cell: Mapping[str, Any]) -> str:
    return _number(cell["paper"]) + ("" if cell["delta"] is None else f" ({cell['delta']:+.4f})")


def _minus(difference: Mapping[str, Any] | None) -> str:
    value, low, high = (difference[k] if difference else None for k in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:+.4f} [-]" if low is None or high is None else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4f}"


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names)) or "none"
