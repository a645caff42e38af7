"""Metrics from a confusion matrix: numpy, float64, on the host.

Notation: C (k, k) int64, rows = truth, columns = prediction; TP_c = C_cc, FN_c = sum_j C_cj - TP_c,
FP_c = sum_i C_ic - TP_c. A quotient 0/0 is nan: precision of a class never predicted, recall of a class absent from
the truth, F1 and IoU of a class absent from both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

PER_CLASS = ("precision", "recall", "f1", "iou")


class Metrics(NamedTuple):
    """Everything that a confusion matrix says.

    oa: overall pixel accuracy. kappa: Cohen's. fwiou: IoU weighted by the share of each class in the truth.
    precision, recall, f1, iou: per class, nan where undefined. support: true pixels per class.
    macro: {name: mean over the macro classes, those where it is undefined left out}; `macro["iou"]` is the mIoU.
    macro_zero: the same with 0 for what is undefined (scikit-learn's zero_division=0).
    """

    oa: float
    kappa: float
    fwiou: float
    precision: Float64[np.ndarray, " k"]
    recall: Float64[np.ndarray, " k"]
    f1: Float64[np.ndarray, " k"]
    iou: Float64[np.ndarray, " k"]
    support: Int64[np.ndarray, " k"]
    macro: dict[str, float]
    macro_zero: dict[str, float]


def metrics(confusion: Int64[np.ndarray, "k k"], macro_classes: Sequence[int] | None = None) -> Metrics:
    """All metrics of a confusion matrix.

    P = TP / (TP + FP), R = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN), IoU = TP / (TP + FP + FN),
    OA = trace / total, kappa = (OA - e) / (1 - e) with e = sum_c (truth_c prediction_c) / total^2,
    fwIoU = sum_c truth_c / total IoU_c.

    macro_classes: classes that macro averages run over (default: all). Leaving a class out drops it from the averages
    only: its pixels still are false positives and negatives of the others, and count in OA and kappa.

    `macro`, which reports print, leaves out what is undefined: a class that is nowhere in a test set says nothing about
    a network. A class absent from the truth but predicted has IoU 0 and does count. Where every class occurs in truth
    and prediction, as on the papers' test sets, both conventions agree.

    An empty matrix gives nan throughout.
    """
    c = np.asarray(confusion, np.float64)
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"a confusion matrix is square, not {c.shape}")
    hits, truth, predicted, total = np.diag(c), c.sum(1), c.sum(0), c.sum()
    iou = _quotient(hits, truth + predicted - hits)
    per_class = {
        "precision": _quotient(hits, predicted),
        "recall": _quotient(hits, truth),
        "f1": _quotient(2 * hits, truth + predicted),
        "iou": iou,
    }
    oa = float(_quotient(hits.sum(), total))
    chance = float(_quotient(truth @ predicted, total**2))
    chosen = list(range(len(c)) if macro_classes is None else macro_classes)
    return Metrics(
        oa=oa,
        kappa=float(_quotient(oa - chance, 1.0 - chance)),
        fwiou=float(_quotient(np.nansum(truth * iou), total)),
        **per_class,
        support=np.asarray(confusion).sum(1).astype(np.int64),
        macro={name: nan_mean(per_class[name][chosen]) for name in PER_CLASS},
        macro_zero={
            name: float(np.nan_to_num(per_class[name][chosen]).mean()) if total and chosen else float("nan")
            for name in PER_CLASS
        },
    )


class TileMean(NamedTuple):
    """Means over tiles, per class (k,): f1, iou, and the number of tiles that they run over."""

    f1: Float64[np.ndarray, " k"]
    iou: Float64[np.ndarray, " k"]
    tiles: Int64[np.ndarray, " k"]


def tile_mean(per_tile: Sequence[Int64[np.ndarray, "k k"]], num_classes: int) -> TileMean:
    """Per-class F1 and IoU of every tile, averaged over tiles.

    A tile with a class in neither truth nor prediction has no F1 or IoU of that class: it is left out of that class's
    mean, and `tiles` says how many are left. A tile where the class is only predicted counts as 0.
    """
    c = np.asarray(per_tile, np.float64).reshape(-1, num_classes, num_classes)
    hits, either = np.einsum("nkk->nk", c), c.sum(1) + c.sum(2)
    f1, iou = _quotient(2 * hits, either), _quotient(hits, either - hits)
    return TileMean(
        np.array([nan_mean(x) for x in f1.T]), np.array([nan_mean(x) for x in iou.T]), np.sum(either > 0, axis=0)
    )


def nan_mean(x: Float64[np.ndarray, " n"]) -> float:
    """Mean of what is not nan; nan, without a warning, if nothing is."""
    x = np.asarray(x, np.float64)
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else float("nan")


def _quotient(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b != 0)
