"""The verb of whole tables: reproduce."""

import sys
from pathlib import Path

from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli import common
from sarjax.cli.common import note, print_json
from sarjax.errors import UserError


def reproduce(
    paper: Positional[str],
    data: str = "",
    rows: str = "",
    seeds: int = 3,
    preset: str = "",
    epochs: float = 0.0,
    labelled: float = 0.0,
    workdir: Path = Path("runs"),
    data_dir: str = "",
    test: FlagCreatePairsOff[bool] = False,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Run the rows of a paper's tables and print them beside its own figures; what is done is skipped

    Exit code 2 where a row failed (the others go on), 143 where SIGTERM stopped it: the same command then goes on.

    Args:
        paper: whose tables; an unknown name lists them.
        data: "" = the paper's own (whu_opt_sar; levir_cd or another set of its family for frd), ombria, or synthetic
            (scenes and records are then made in WORKDIR/synthetic).
        rows: which rows, separated by commas ("" = all).
        seeds: every row runs with seeds 0 to SEEDS - 1.
        preset: "cpu" = a quarter of the width, a third of the epochs, crops of 128 pixels, for all rows alike.
        epochs: of every row (0 = its own).
        labelled: share of labelled tiles of the rows that have only some (0 = their own); use a --workdir for each.
        workdir: WORKDIR/DATA/ROW-SEED are the runs, WORKDIR/DATA/table.md and table.json what is printed.
        data_dir: where built records are ("" = $SARJAX_DATA_DIR, else ~/sarjax_data).
        test: also look at the test split, once a run, with the rows that the table judges on it.
        json: print JSON instead of Markdown.
    """
    from sarjax import experiments
    from sarjax.reports.comparison import markdown

    plan = experiments.make_plan(
        paper,
        workdir,
        data=data,
        rows=[name.strip() for name in rows.split(",") if name.strip()],
        seeds=seeds,
        preset=preset,
        epochs=epochs,
        labelled=labelled,
        data_dir=data_dir,
        test=test,
    )
    common.devices(experiments.host_devices(plan))
    outcome = experiments.reproduce(plan, say=note)
    if json:
        print_json(outcome.document)
    else:
        print(markdown(outcome.document), end="")
    note(f"written: {plan.folder / 'table.md'}, {plan.folder / 'table.json'}")
    if outcome.stopped:
        sys.exit(143)
    if outcome.failures:
        raise UserError(
            f"{len(outcome.failures)} of {len(plan.chosen) * plan.seeds} runs failed ({', '.join(outcome.failures)}); "
            "the table says why, and the same command tries them again."
        )
