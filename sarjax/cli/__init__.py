"""`sarjax <verb>`: parse, call, and turn known errors into one line. Loads no jax until a verb needs it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import FlagCreatePairsOff

from sarjax.cli import common
from sarjax.cli.bench import bench_verb
from sarjax.cli.common import Verb, command, dispatch, note, print_json
from sarjax.cli.data import data_verb
from sarjax.cli.maps import export, predict
from sarjax.cli.plan import plan_verb
from sarjax.cli.tables import reproduce
from sarjax.cli.training import evaluate, recipes_verb, report, show, train_verb
from sarjax.errors import UserError


def models(size: int = 256, classes: int = 7, channels: int = 3, json: FlagCreatePairsOff[bool] = False) -> None:
    """List the networks: parameters, memory, operations, and those of a published table beside ours

    Table 2 of Cheng et al. is counted at its own size (256x256x3) and with the number of classes that fits each row.

    Args:
        size: side of the input in pixels.
        classes: number of classes.
        channels: input channels (of each date, for networks that compare dates).
        json: print JSON instead of a table.
    """
    common.devices(1)
    from sarjax.models.cost import model_table
    from sarjax.models.published import table2

    rows = model_table(size=size, classes=classes, channels=channels)
    published = table2()
    if json:
        print_json([row | {"table2": [of for of in published if of["network"] == row["name"]]} for row in rows])
        return
    print(f"{'network':<20}{'parameters':>14}{'memory MB':>12}{'Flops G':>10}{'XLA GFLOP':>12}{'XLA peak MiB':>14}")
    for row in rows:
        print(
            f"{row['name']:<20}{row['parameters']:>14,}{row['memory_mb']:>12.3f}{row['flops'] / 1e9:>10.4f}"
            f"{row['xla_flops'] / 1e9:>12.3f}{row['xla_peak_bytes'] / 2**20:>14.1f}"
        )
    _print_table2(published)


def _print_table2(rows: Sequence[dict[str, Any]]) -> None:
    print(
        "\nCheng et al., Table 2: ours (and the difference of its two digits from the printed ones, where they differ)"
    )
    print(f"{'system':<11}{'network':<11}{'classes':>7}{'parameters M':>18}{'memory MB':>18}{'Flops G':>12}")
    for row in rows:
        ours = row["parameters"] / 1e6, row["memory_mb"], row["flops"] / 1e9
        figures = [
            f"{value:.3f}" + (f" ({difference:+.2f})" if difference else "")
            for value, difference in zip(ours, row["difference"].values(), strict=True)
        ]
        print(f"{row['system']:<11}{row['network']:<11}{row['classes']:>7}" + "{:>18}{:>18}{:>12}".format(*figures))
    for row in rows:
        print(f"{row['system']}: {row['remark']}")


def demo(out: Path = Path("sarjax-demo"), seed: int = 0) -> None:
    """Synthesize scenes, teach a SAR network by an optical one, compare, map a scene: minutes on two cores

    Args:
        out: the folder for everything that is made; the same command goes on where it stopped.
        seed: of scenes and training.
    """
    common.devices()
    from sarjax.demo import run

    with common.stoppable():
        run(out, seed, say=note)


VERBS: dict[str, Verb] = {
    "demo": command("demo", demo),
    "data": data_verb,
    "recipes": recipes_verb,
    "plan": plan_verb,
    "train": train_verb,
    "eval": command("eval", evaluate),
    "show": command("show", show),
    "report": command("report", report),
    "predict": command("predict", predict),
    "export": command("export", export),
    "bench": bench_verb,
    "models": command("models", models),
    "reproduce": command("reproduce", reproduce),
}


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: exit code 2 and one line on stderr for what a user can mend."""
    try:
        dispatch("sarjax", VERBS, list(sys.argv[1:] if args is None else args))
    except UserError as e:
        note(f"sarjax: {e}")
        sys.exit(2)
    except KeyboardInterrupt:
        note("sarjax: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
