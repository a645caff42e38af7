"""What the runs of a table's rows left in a folder: FOLDER/<row>-<seed>.

A run's `reproduce.json` says how far it came and which results belong to which of its checkpoints.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarjax import config as configs
from sarjax.config import Config
from sarjax.errors import UserError
from sarjax.files import file_digest, write_atomically
from sarjax.recipes.tables import Table
from sarjax.reports.comparison import Result, Results, compare
from sarjax.reports.evaluation import read_json
from sarjax.spec import DatasetSpec
from sarjax.train.run import read_config, read_data_description, read_manifest

SPLITS = ("val", "test")


class Collected(NamedTuple):
    """Of finished runs: results by split, facts by row; the records and machines that they ran on, a line each.

    left_out: a sentence for each run that is damaged or of another experiment. spec: of the data (None = there are no
    runs).
    """

    results: Mapping[str, Results]
    rows: dict[str, dict[str, Any]]
    records: list[str]
    machines: list[str]
    left_out: list[str]
    spec: DatasetSpec | None


def collect(folder: Path, expected: Mapping[str, Callable[[int], Config]], baseline: str) -> Collected:
    """The finished runs of every row, whoever ran them.

    expected: {row: the configuration of a seed}; a fingerprint "" is any. baseline: the row that the facts say the
    difference from.
    """
    results: dict[str, dict[str, dict[int, Result]]] = {split: {} for split in SPLITS}
    rows: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    records, machines, spec = {}, {}, None
    first = {name: config(0) for name, config in expected.items()}
    for name, config in first.items():
        runs: dict[str, dict[str, Any]] = {}
        for seed, run in _finished(folder, name):
            try:
                found = _read(run, expected[name](seed))
            except UserError as e:
                left_out.append(f"{run.name}: {e}")
                continue
            spec = found.spec
            records[found.records] = machines[found.machine] = None
            runs[str(seed)] = found.facts
            for split, result in found.results.items():
                results[split].setdefault(name, {})[seed] = result
        seconds = [r["seconds"] for r in runs.values() if "seconds" in r]
        rows[name] = {
            "recipe": config.recipe,
            "differs": differs(first[baseline], config) if baseline in first else [],
            "seeds": [int(seed) for seed in runs],
            "parameters": next((r.get("parameters") for r in runs.values()), None),
            "seconds": sum(seconds) / len(seconds) if seconds else None,
            "runs": runs,
        }
    return Collected(results, rows, list(records), list(machines), left_out, spec)


def differs(baseline: Config, config: Config) -> list[str]:
    """In what a row differs from the baseline; of another network, its name says enough."""
    lines = configs.difference(baseline.experiment, config.experiment)
    named = [line for line in lines if line.startswith("network.name:")]
    return [line for line in lines if not (named and line.startswith("network."))] + named


def compared(table: Table, collected: Collected, same_data: bool, known: dict[str, Any]) -> dict[str, Any]:
    """A table as JSON values: what it is, and `compare` by split. known: intervals, as `compare` has them."""
    names = {row.name for row in table.rows}
    spec, splits = collected.spec, {}
    for split, results in collected.results.items():
        if spec is not None and names & results.keys():
            splits[split] = compare(table, results, spec, same_data, known)
    return {
        "name": table.name,
        "title": table.title,
        "source": table.source,
        "figures_of": table.data,
        "same_data": same_data,
        "note": table.note,
        "baseline": table.baseline,
        "metrics": list(table.metrics),
        "splits": splits,
    }


def _finished(folder: Path, name: str) -> list[tuple[int, Path]]:
    """(seed, run) of a row's finished runs."""
    found = []
    for run in folder.glob(f"{name}-*"):
        seed = re.fullmatch(re.escape(name) + r"-(\d+)", run.name)
        if seed and "step" in read_record(run):
            found.append((int(seed[1]), run))
    return sorted(found)


class _Run(NamedTuple):
    """What `collect` takes of a run: results by split, facts, its records and machine in words, the data's spec."""

    results: dict[str, Result]
    facts: dict[str, Any]
    records: str
    machine: str
    spec: DatasetSpec


def _read(run: Path, wanted: Config) -> _Run:
    """A finished run; UserError where it is damaged, or is not what the row says that it is."""
    here, record, manifest = read_config(run).experiment, read_record(run), read_manifest(run)
    fingerprint = wanted.experiment.data.fingerprint or here.data.fingerprint
    data = dataclasses.replace(wanted.experiment.data, fingerprint=fingerprint)
    changed = configs.difference(here, dataclasses.replace(wanted.experiment, data=data))
    if changed:
        raise UserError(f"it is of another experiment than is asked for ({'; '.join(changed)}).")
    as_its_row(manifest)
    best, results = best_checkpoint(run, record), {}
    for split in SPLITS:
        of = record.get("evaluated", {}).get(split, {}).get("checkpoint", best)
        if of != best:
            raise UserError(f"its results on {split} are of {of}, but {best} is its best.")
        result = read_result(run, split)
        if result:
            results[split] = result
    spec, statistics = read_data_description(run)
    tiles = ", ".join(f"{n} {split}" for split, n in statistics.tiles.items())
    built = f"{here.data.name}{f' ({here.data.config})' if here.data.config else ''}"
    return _Run(
        results,
        record | {"looks_at_test": len(manifest.get("test_looks", []))},
        f"{built}, fingerprint {here.data.fingerprint}, tiles: {tiles}",
        _machine(run, manifest),
        spec,
    )


def as_its_row(manifest: Mapping[str, Any]) -> None:
    """UserError for a run that is longer than its row, or starts elsewhere; its configuration does not say so."""
    if "extended_to" in manifest:
        steps = manifest["extended_to"]
        raise UserError(f"it was extended to step {steps}; a run of the row's own length is accepted.")
    if "init_from" in manifest:
        raise UserError(f"it started from {manifest['init_from']}; a run that starts as its row says is accepted.")


def _machine(run: Path, manifest: Mapping[str, Any]) -> str:
    try:
        start = manifest["starts"][0]
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        return f"{start['devices']} x {start['device']}, Python {start['python']}, {versions}"
    except (KeyError, IndexError, TypeError) as e:
        raise UserError(f"{run / 'manifest.json'} names no start; the file that the run wrote is accepted.") from e


def best_checkpoint(run: Path, record: Mapping[str, Any]) -> str:
    """The checkpoint of a finished run that a table is about: its best on val, or its last where none is kept."""
    if "best" not in record:
        raise UserError(f"{run / 'reproduce.json'} names no best checkpoint; `sarjax reproduce` of its row notes it.")
    return f"checkpoints/{record['step']}" if record["best"] is None else f"best/{record['best']}"


def read_record(run: Path) -> dict[str, Any]:
    """RUN/reproduce.json: {"seconds" of training, once finished "step", "parameters", "best"; "evaluated" by split}.

    best: the step that was best on val (None = none is kept). A start that was killed (not by SIGTERM) leaves no
    seconds.
    """
    return read_object(run / "reproduce.json")


def write_record(run: Path, record: Mapping[str, Any]) -> None:
    write_atomically(run / "reproduce.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Of a JSON file; empty where there is none that can be read: what it held is then made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_result(run: Path, split: str, checkpoint: str = "") -> Result | None:
    """The evaluation of a run that its record vouches for; None where it is not there, or not of `checkpoint`."""
    file, of = results_file(run, split), read_record(run).get("evaluated", {}).get(split)
    if not of or not file.is_file() or file_digest(file)[1] != of["sha256"]:
        return None
    return Result(read_json(file), of["sha256"]) if checkpoint in ("", of["checkpoint"]) else None


def vouch(run: Path, split: str, checkpoint: str) -> None:
    """Notes in a run's record that its results on `split` are of `checkpoint`."""
    record = read_record(run)
    of = {"checkpoint": checkpoint, "sha256": file_digest(results_file(run, split))[1]}
    write_record(run, record | {"evaluated": record.get("evaluated", {}) | {split: of}})


def results_file(run: Path, split: str) -> Path:
    return run / "eval" / f"{split}-best.json"
