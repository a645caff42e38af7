"""Average precision per class, from histograms of scores that are counted exactly on device.

The confusion matrix sees only the most probable class; this sees how well a class's probability ranks pixels, whatever
the threshold.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int, Integer, Num

from sarjax.spec import IGNORE_LABEL

# 128 bins to an octave of |log-odds| + 1/64, up to 1,024: 0.0001 wide around 0, at most 0.8 % of the log-odds beyond.
# A bin's pixels count as one threshold, which takes 0.001 off at most, more only if a class's log-odds hardly differ.
BINS = 4096
_LINEAR, _DROPPED_BITS = 2.0**-6, 16
_FIRST = int(np.float32(_LINEAR).view(np.int32)) >> _DROPPED_BITS


def score_histogram(
    logits: Float[Array, "b h w k"],
    label: Int[Array, "b h w"],
    row_valid: Num[Array, " b"] | None = None,
    *,
    ignore_label: int = IGNORE_LABEL,
) -> Int[Array, "k 2 bins"]:
    """Pixels by class, whether it is the true one (1) or not (0), and bin of its log-odds.

    Bins are fixed, and increase with the log-odds and so with the probability, which itself could not tell apart what
    is nearly 1; the outermost are open.

    One integer scatter-add over all pixels: exact, without sorting, and each device adds up its own pixels, however
    rows and height are sharded.

    Args:
      logits: computed in float32.
      label: classes; pixels with `ignore_label` or any label outside 0..k-1 are left out.
      row_valid: 0 for padding rows, which are left out; None = all are valid.

    Returns:
      (k, 2, BINS) int32, exact while a batch has fewer than 2^31 pixels.
    """
    num_classes = logits.shape[-1]
    label = label.astype(jnp.int32)
    keep = (label != ignore_label) & (label >= 0) & (label < num_classes)
    if row_valid is not None:
        keep &= (row_valid > 0)[:, None, None]
    classes = jnp.arange(num_classes)
    truth = (label[..., None] == classes).astype(jnp.int32)
    index = (2 * classes + truth) * BINS + _bin(log_odds(logits))
    counted = jnp.broadcast_to(keep[..., None], index.shape).astype(jnp.int32)
    flat = jnp.zeros(num_classes * 2 * BINS, jnp.int32).at[index].add(counted, mode="promise_in_bounds")
    return flat.reshape(num_classes, 2, BINS)


def log_odds(logits: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """log(p / (1 - p)) of p = softmax(logits): z_c - log sum_{j != c} exp z_j, in float32, for two classes or more.

    As exact for p near 1 as for p near 0: 1 - p is never formed.
    """
    z = logits.astype(jnp.float32)
    largest = jnp.max(z, axis=-1, keepdims=True)
    top = z == largest
    tops = jnp.sum(top, axis=-1, keepdims=True)
    second = jnp.where(tops > 1, largest, jnp.max(jnp.where(top, -jnp.inf, z), axis=-1, keepdims=True))
    # Of all but one of the largest, whose exponentials would swallow the others'.
    e = jnp.where(top, 0.0, jnp.exp(z - second))
    rest = jnp.sum(e, axis=-1, keepdims=True) + (tops - 1)
    beside = jnp.exp(second - largest) * (rest - e)
    return jnp.where(top, largest - second - jnp.log(rest), z - largest - jnp.log(1 + beside))


def average_precision(scores: Integer[np.ndarray, "k 2 bins"]) -> Float64[np.ndarray, " k"]:
    r"""Area under the precision-recall curve of each class, as a sum of steps.

    .. math:: AP = \sum_n (R_n - R_{n-1}) P_n

    over thresholds from the highest bin down, R_n and P_n being recall and precision of the pixels at or above it; as
    scikit-learn's `average_precision_score` of the bins' numbers, in float64. nan for a class without a true pixel.

    Args:
      scores: `score_histogram`, or sums of it over batches.

    Example:
      >>> average_precision(np.array([[[0, 1, 0], [0, 1, 2]], [[2, 1, 1], [0, 0, 0]]])).tolist()
      [0.9166666666666666, nan]
    """
    down = np.asarray(scores, np.float64)[:, :, ::-1]
    true, hits, above = down[:, 1], np.cumsum(down[:, 1], -1), np.cumsum(down.sum(1), -1)
    precision = np.divide(hits, above, out=np.zeros_like(hits), where=above > 0)
    total = hits[:, -1]
    return np.divide((true * precision).sum(-1), total, out=np.full(len(total), np.nan), where=total > 0)


def _bin(x):
    """Bin of log-odds, 0..BINS - 1, also of what is no number: a float's leading bits, as an integer, grow with it."""
    bits = lax.bitcast_convert_type(jnp.abs(x) + _LINEAR, jnp.int32) >> _DROPPED_BITS
    number = jnp.minimum(bits - _FIRST, BINS // 2 - 1)
    return jnp.where(x < 0, BINS // 2 - 1 - number, BINS // 2 + number)
