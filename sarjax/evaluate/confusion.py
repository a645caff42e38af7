"""One confusion matrix, counted exactly on device; every metric is derived from it."""

import jax.numpy as jnp
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

    One-hot products per image line in float32, where a count cannot exceed the line's width and so is exact, then
    int32 sums over lines, exact up to 2^31 pixels a row. (One float32 sum would silently stop at 2^24 = 4096^2
    pixels.) Lines are independent, so the height may be sharded.

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
    classes = jnp.arange(num_classes)
    truth = label.astype(jnp.int32)
    keep = truth != ignore_label
    if row_valid is not None:
        keep &= (row_valid > 0)[:, None, None]
    truth = ((truth[..., None] == classes) & keep[..., None]).astype(jnp.float32)
    predicted = (prediction.astype(jnp.int32)[..., None] == classes).astype(jnp.float32)
    lines = jnp.einsum("bhwi,bhwj->bhij", truth, predicted)
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
