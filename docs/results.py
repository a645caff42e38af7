"""The table of docs/results.md from the runs that docs/results.sh left: python docs/results.py FOLDER."""

import sys
from pathlib import Path

import numpy as np

from sarjax.evaluate.bootstrap import paired_bootstrap
from sarjax.evaluate.metrics import metrics
from sarjax.reports.evaluation import read_json

ROWS = ("ombria_s1", "ombria_s1_plain", "ombria_s2")
FLOOD = 1


def flood_iou(confusion):
    return metrics(confusion).iou[FLOOD]


folder = Path(sys.argv[1])
for split in ("val", "test"):
    runs = {row: [read_json(p) for p in sorted(folder.glob(f"{row}-[0-9]/eval/{split}-best.json"))] for row in ROWS}
    print(f"\n{split}\n\n| row | seeds | flood IoU, pooled | F1, pooled | IoU, tile mean | F1, tile mean |")
    print("|---|---|---|---|---|---|")
    for row, found in runs.items():
        values = np.array(
            [
                (
                    metrics(e.confusion).iou[FLOOD],
                    metrics(e.confusion).f1[FLOOD],
                    e.tile_mean().iou[FLOOD],
                    e.tile_mean().f1[FLOOD],
                )
                for e in found
            ]
        )
        if len(values):
            spread = values.std(0, ddof=1) if len(values) > 1 else np.full(4, np.nan)
            cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(values.mean(0), spread, strict=True)]
            print(f"| `{row}` | {len(values)} | " + " | ".join(cells) + " |")
    for a, b in (("ombria_s1", "ombria_s1_plain"), ("ombria_s2", "ombria_s1")):
        if runs[a] and runs[b]:
            d = paired_bootstrap([e.per_tile for e in runs[a]], [e.per_tile for e in runs[b]], flood_iou)
            print(f"\n{a} - {b}: {d.value:+.4f}, 95 % of resampled tiles in [{d.low:+.4f}, {d.high:+.4f}]")
