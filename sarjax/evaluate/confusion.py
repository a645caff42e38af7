"""One confusion matrix, counted exactly on device; every metric is derived from it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num

from sarjax.spec import IGNORE_LABEL


def confusion_per_row(
    prediction: Num[Array, "b h w *k"],
    label: Int[Array, "b h w"],
    row_valid: Num[Array, " b"] | None,
    num_classes: int,
    *,
    ignore_label: int = IGNORE_LABEL,
) -> Int[Array, "b k k"]:
    """Pixels per (truth, predicted) class of every row: rows of the matrix = truth, columns = prediction.

    Counted in int32, exact up to 2^31 pixels a row: by a scatter-add on a CPU, where that takes a thirtieth of the time
    of products, and by products elsewhere. Lines are independent, so the height may be sharded.

    Args:
      prediction: logits (b, h, w, k), whose largest is taken (the first of equals), or class indices (b, h, w).
      label: classes; pixels with `ignore_label` or any label outside 0..k-1 are left out.
      row_valid: 0 for padding rows, whose matrix is 0; None = all are valid.
      num_classes: k.

    Returns:
      (b, k, k) int32.
    """
    if prediction.ndim == label.ndim + 1:
        prediction = jnp.argmax(prediction, axis=-1)
    truth, predicted = jnp.asarray(label, jnp.int32), jnp.asarray(prediction, jnp.int32)
    keep = truth != ignore_label
    for classes in (truth, predicted):
        keep &= (classes >= 0) & (classes < num_classes)
    if row_valid is not None:
        keep &= (row_valid > 0)[:, None, None]
    arguments = truth, predicted, keep, jnp.arange(num_classes)
    return lax.platform_dependent(*arguments, cpu=by_scatter, default=by_products)


def by_scatter(truth: Array, predicted: Array, keep: Array, classes: Array) -> Int[Array, "b k k"]:
    """One bin per row and pair of classes; what is left out adds 0 to one of them. Devices add up their own pixels."""
    b, k = len(truth), len(classes)
    pair = (jnp.arange(b)[:, None, None] * k + truth) * k + predicted
    counts = jnp.zeros(b * k * k, jnp.int32)
    return counts.at[jnp.where(keep, pair, 0)].add(keep.astype(jnp.int32), mode="promise_in_bounds").reshape(b, k, k)


def by_products(truth: Array, predicted: Array, keep: Array, classes: Array) -> Int[Array, "b k k"]:
    """One-hot products per image line in float32, where a count cannot exceed the line's width and so is exact, then
    int32 sums over lines. (One float32 sum would silently stop at 2^24 = 4096^2 pixels.)
    """
    one, other = ((x[..., None] == classes).astype(jnp.float32) for x in (truth, predicted))
    lines = jnp.einsum("bhwi,bhwj->bhij", one * keep[..., None], other)
    return jnp.sum(lines.astype(jnp.int32), axis=1)


def confusion_matrix(
    prediction: Num[Array, "b h w *k"],
    label: Int[Array, "b h w"],
    row_valid: Num[Array, " b"] | None,
    num_classes: int,
    *,
    ignore_label: int = IGNORE_LABEL,
) -> Int[Array, "k k"]:
    """`confusion_per_row` summed over the batch, (k, k) int32: exact while a batch has fewer than 2^31 pixels.

    A test set has more, so add batches up on the host in int64 (`sarjax.evaluate.evaluator` does).
    """
    return jnp.sum(confusion_per_row(prediction, label, row_valid, num_classes, ignore_label=ignore_label), axis=0)
