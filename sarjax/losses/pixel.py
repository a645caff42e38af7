"""Losses over pixels, as pairs (total, weight): the value is total / weight, divided once by the global weight."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sarjax.spec import IGNORE_LABEL

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def cross_entropy(
    logits: Float[Array, "b h w k"],
    labels: Int[Array, "b h w"],
    *,
    ignore_label: int = IGNORE_LABEL,
    class_weights: Float[Array, " k"] | Sequence[float] | None = None,
    pixel_weights: Float[Array, "b h w"] | None = None,
    label_smoothing: float = 0.0,
) -> Pair:
    r"""Cross-entropy over valid pixels.

    .. math::
      total = \sum_p u_p \sum_c w_c q_{pc} (-\log softmax(z_p)_c), \quad
      weight = \sum_p u_p w_{y_p}, \quad q_{pc} = (1 - \epsilon) [c = y_p] + \epsilon / k

    which is `torch.nn.functional.cross_entropy(weight=w, label_smoothing=eps)` when divided.

    Args:
      logits: finite, computed in float32 whatever their dtype.
      labels: class indices; any label outside 0..k-1 is left out too.
      ignore_label: label of the pixels to leave out; their logits get a gradient of exactly 0, even if not finite.
      class_weights: w, default 1.
      pixel_weights: u >= 0, default 1; no gradient is stopped here.
      label_smoothing: eps in [0, 1).

    Returns:
      (total, weight): (0, 0) if there is no valid pixel. A constant factor on the weights cancels in the quotient.

    Example:
      >>> total, weight = cross_entropy(jnp.zeros((1, 1, 2, 2)), jnp.array([[[0, 255]]]))
      >>> round(float(total / weight), 4), float(weight)
      (0.6931, 1.0)
    """
    num_classes = logits.shape[-1]
    valid, one_hot = _targets(labels, num_classes, ignore_label)
    # Replaced, not multiplied by 0: a logit that is not finite must not reach a sum.
    log_p = jax.nn.log_softmax(jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0))
    class_weights = jnp.ones(num_classes) if class_weights is None else jnp.asarray(class_weights, jnp.float32)
    target = one_hot
    if label_smoothing:
        target = (1.0 - label_smoothing) * one_hot + label_smoothing / num_classes * valid[..., None]
    # A product with one-hot labels: the gather of take_along_axis would have a scatter as its gradient.
    loss = -jnp.sum(class_weights * target * log_p, axis=-1)
    weight = jnp.sum(class_weights * one_hot, axis=-1)
    if pixel_weights is not None:
        pixel_weights = jnp.where(valid, pixel_weights, 0.0)
        loss, weight = loss * pixel_weights, weight * pixel_weights
    return jnp.sum(loss), jnp.sum(weight)


def dice_loss(
    logits: Float[Array, "b h w k"],
    labels: Int[Array, "b h w"],
    *,
    ignore_label: int = IGNORE_LABEL,
    smooth: float = 1e-6,
) -> Pair:
    r"""Soft Dice over valid pixels, pooled over the batch, one value per class that the labels hold.

    .. math::
      total = \sum_{c \in present} 1 - \frac{2 \sum_p s_{pc} t_{pc}}{\sum_p s_{pc} + \sum_p t_{pc}}, \quad
      weight = |present|, \quad s = softmax(z),\ t = \text{one-hot}(y)

    Dice is no sum over pixels: it **couples** the rows of a batch. Pooling over the batch keeps a tile without some
    class from counting as a failure; under accumulation the pairs of microbatches add up to the mean over
    (microbatch, class), each pooled over its microbatch only, so a method that uses this names it in `couples`.

    `optax.losses.dice_loss` has no ignore label: ignored pixels are given to a class of their own, which is dropped.
    Its `smooth` of 1 pixel would make the loss depend on the image's size, so it is next to nothing here.

    Args:
      logits: finite, computed in float32 whatever their dtype.
      labels: class indices; any label outside 0..k-1 is left out too.
      ignore_label: label of the pixels to leave out; their logits get a gradient of exactly 0.
      smooth: added to numerator and denominator, in pixels.

    Returns:
      (total, weight): (0, 0) if there is no valid pixel.

    Source: Milletari et al., V-Net (2016); several classes by their plain mean.
    """
    num_classes = logits.shape[-1]
    valid, one_hot = _targets(labels, num_classes, ignore_label)
    ignored = jnp.where(valid, -jnp.inf, 0.0)[..., None]
    padded = jnp.concatenate([jnp.where(valid[..., None], logits.astype(jnp.float32), -jnp.inf), ignored], axis=-1)
    targets = jnp.concatenate([one_hot, jnp.zeros_like(ignored)], axis=-1)
    axes = tuple(range(logits.ndim - 1))
    loss = optax.losses.dice_loss(padded, targets, smooth=smooth, reduction="none", axis=axes)[:num_classes]
    present = (jnp.sum(one_hot, axis=axes) > 0).astype(jnp.float32)
    return jnp.sum(loss * present), jnp.sum(present)


def class_weights_from_histogram(class_pixels: Sequence[int]) -> np.ndarray:
    r"""Class weights (k,) float32 from the training split's labelled pixels per class.

    w_c = s / sqrt(n_c), s such that the mean over present classes is 1. Absent classes get 1: no pixel will use it,
    unless a later split holds the class, which is then an average one. The root tempers the plain inverse, under
    which a class with one pixel in a million decides everything.
    """
    n = np.asarray(class_pixels, np.float64)
    present = n > 0
    if not present.any():
        return np.ones(n.shape, np.float32)
    w = 1.0 / np.sqrt(np.where(present, n, 1.0))
    return np.where(present, w / w[present].mean(), 1.0).astype(np.float32)


def _targets(labels, num_classes, ignore_label):
    labels = labels.astype(jnp.int32)
    valid = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
    one_hot = (labels[..., None] == jnp.arange(num_classes)) & valid[..., None]
    return valid, one_hot.astype(jnp.float32)
