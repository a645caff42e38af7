"""`sarjax bench deploy`: what a trained run costs where it is deployed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from sarjax.cli import common
from sarjax.cli.common import note, print_json


def deploy(
    run: Positional[Path],
    against: Path | None = None,
    size: int = 0,
    head: str = "",
    checkpoint: Literal["best", "last"] = "best",
    repetitions: int = 50,
    json: FlagCreatePairsOff[bool] = False,
) -> None:
    """Measure a run beside its teacher as they are deployed: operations, file, memory, latency in float32 and bfloat16

    Args:
        run: the run's directory; the result goes to RUN/bench/deploy.json.
        against: another run to compare with (default: the teacher that the run keeps, where it has one).
        size: side of the tile in pixels, a multiple of the network's alignment (0 = as it was trained).
        head: which of the method's heads ("" = its default).
        checkpoint: the best on val (the last where none was kept), or the last.
        repetitions: timed calls of each program, after warm-up; the 99th percentile of 100 or fewer is the slowest.
        json: print JSON instead of a table.
    """
    import jax

    common.devices(1)
    jax.config.update("jax_platforms", "cpu")  # here nothing is computed: an accelerator is left to what measures
    from sarjax.bench.deploy import bench_deploy

    with common.stoppable("nothing was written"):
        found = bench_deploy(
            run,
            against=against,
            size=size,
            head=head,
            checkpoint=checkpoint,
            repetitions=repetitions,
            say=note,
        )
    if json:
        print_json(found)
    else:
        _print(found)
    note(f"written: {run / 'bench' / 'deploy.json'}")


def _print(found: dict[str, Any]) -> None:
    networks = found["networks"]

    def row(name: str, values: Sequence[str]) -> None:
        print(f"{name:<38}" + "".join(f"{value:>24}" for value in values))

    def rows(precision: str) -> None:
        facts = [network["precisions"][precision] for network in networks]
        print(f"\n{precision}")
        row("  file, MB", [f"{f['artifact_bytes'] / 1e6:.2f}" for f in facts])
        row(
            "  XLA's operations, GFLOP",
            ["-" if f["xla_flops"] is None else f"{f['xla_flops'] / 1e9:.3f}" for f in facts],
        )
        row("  XLA's peak memory, MiB", [f"{f['xla_peak_bytes'] / 2**20:.1f}" for f in facts])
        row("  process's peak RSS, MiB (at start)", [_resident(f) for f in facts])
        for latencies in zip(*(f["latency"] for f in facts), strict=True):
            threads = latencies[0]["threads"]
            where = found["device"] if threads is None else f"{threads} thread" + "s" * (threads > 1)
            row(f"  latency, {where}, p50 / p99 ms", [f"{x['p50_ms']:.2f} / {x['p99_ms']:.2f}" for x in latencies])

    size, jax = found["size"], found["versions"]["jax"]
    on = f"{found['processor']}, {found['cores']} cores" if found["platform"] == "cpu" else found["device"]
    print(f"{size} x {size} pixels, batch 1, on {found['platform']} ({on}), jax {jax}")
    print(f"latency: {found['measured']}; n = {found['repetitions']}\n")
    row("", [network["role"] for network in networks])
    row("network", [f"{n['network']} {n['encoder']} x{n['width']:g}" for n in networks])
    row("sensors (channels)", [f"{'+'.join(n['sensors'])} ({n['channels']})" for n in networks])
    row("parameters", [f"{n['parameters']:,}" for n in networks])
    row("operations as published, G", [f"{n['flops'] / 1e9:.4f}" for n in networks])
    if len(networks) > 1:
        share = networks[0].get("flops_share")
        row("share of these", ["-" if share is None else f"{share:.1%}", "100.0%"])
    for precision in networks[0]["precisions"]:
        rows(precision)


def _resident(facts: dict[str, Any]) -> str:
    start, peak = facts["rss_start_bytes"], facts["rss_peak_bytes"]
    return "-" if peak is None else f"{peak / 2**20:.0f} ({start / 2**20:.0f})"
