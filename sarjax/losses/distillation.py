"""What a student learns from a teacher's features and logits, as pairs (total, weight) over the pixels that count.

In all of them `weights` says how much each pixel counts: >= 0, soft or not, with a gradient of its own. Where it is 0,
student and teacher may hold anything, also what is not finite, and get a gradient of exactly 0; elsewhere both are
finite. The teacher gets a `stop_gradient` inside; nothing else does. Everything is computed in float32.

On a coarser grid a cell counts by the share of its pixels that do: the caller pools the weights, as it pools images.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sarjax.losses.contrastive import unit

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def feature_loss(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "b h w c"],
    weights: Float[Array, "b h w"],
    *,
    kind: Literal["normalised", "squared"] = "normalised",
) -> Pair:
    r"""Squared difference of features, of their directions or of themselves.

    .. math::
      \text{normalised:}\quad total = \sum_p w_p \sum_c
      \left(\frac{s_{pc}}{|s_p|} - \frac{t_{pc}}{|t_p|}\right)^2 = \sum_p w_p (2 - 2 \cos(s_p, t_p)), \qquad
      \text{squared:}\quad total = \sum_p w_p \frac{1}{C} \sum_c (s_{pc} - t_{pc})^2, \qquad
      weight = \sum_p w_p

    "normalised" is a sum over channels: a mean would make it C times weaker than its weight says. It does not change
    with the length of either vector; one of length 0 has no direction (`unit`) and costs 1, with gradient 0.
    "squared" is `torch.nn.functional.mse_loss` where all weights are equal (FitNet's hint, Romero et al. 2015).

    Args:
      student, teacher: features of the same grid and channels.
      weights: of pixels.
      kind: "normalised" or "squared".

    Returns:
      (total, weight): (0, 0) if no pixel counts.

    Raises:
      ValueError: another `kind`.

    Example:
      >>> s, t = jnp.array([[[[3.0, 0.0]]]]), jnp.array([[[[0.0, 2.0]]]])
      >>> total, weight = feature_loss(s, t, jnp.ones((1, 1, 1)))
      >>> float(total), float(weight)
      (2.0, 1.0)
    """
    if kind not in ("normalised", "squared"):
        raise ValueError(f"no kind of feature loss is called {kind!r}: 'normalised' and 'squared' are")
    weights, student, teacher = _masked(student, teacher, weights)
    if kind == "normalised":
        loss = jnp.sum((unit(student) - unit(teacher)) ** 2, axis=-1)
    else:
        loss = jnp.mean((student - teacher) ** 2, axis=-1)
    return jnp.sum(weights * loss), jnp.sum(weights)


def logit_distillation(
    student: Float[Array, "b h w k"],
    teacher: Float[Array, "b h w k"],
    weights: Float[Array, "b h w"],
    *,
    temperature: float,
) -> Pair:
    r"""Divergence of each pixel's softened class probabilities from the teacher's.

    .. math::
      total = T^2 \sum_p w_p KL(softmax(t_p / T) \| softmax(s_p / T)), \quad weight = \sum_p w_p

    T^2 keeps the gradient's size as T grows. A mean over pixels: public code for classifiers
    (`F.kl_div(..., reduction="sum") / b`) is h w times this on maps.

    Args:
      student, teacher: logits over the same classes.
      weights: of pixels.
      temperature: T > 0.

    Returns:
      (total, weight): (0, 0) if no pixel counts.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).

    Example:
      >>> s, t = jnp.zeros((1, 1, 1, 2)), jnp.log(jnp.array([[[[0.75, 0.25]]]]))
      >>> total, weight = logit_distillation(s, t, jnp.ones((1, 1, 1)), temperature=1.0)
      >>> round(float(total / weight), 4)
      0.1308
    """
    weights, student, teacher = _masked(student, teacher, weights)
    log_s, log_t = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    loss = temperature**2 * jnp.sum(_divergence(log_t, log_s), axis=-1)
    return jnp.sum(weights * loss), jnp.sum(weights)


def channel_wise_distillation(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "b h w c"],
    weights: Float[Array, "b h w"],
    *,
    temperature: float,
) -> Pair:
    r"""Divergence of where each channel looks: its softmax over the pixels of an image, from the teacher's.

    .. math::
      \phi_{bc}(x)_p = \frac{w_{bp} e^{x_{bpc} / T}}{\sum_q w_{bq} e^{x_{bqc} / T}}, \quad
      total = \sum_b \frac{T^2}{C} \sum_c KL(\phi_{bc}(t) \| \phi_{bc}(s)), \quad
      weight = |\{b : \max_p w_{bp} > 0\}|

    A pixel of weight 2 is two pixels, so a factor on a row's weights changes nothing, and the weights only say which
    pixels of a row count, not how much the row does. A row where none does counts 0.

    Args:
      student, teacher: logits or features of the same grid and channels.
      weights: of pixels.
      temperature: T > 0.

    Returns:
      (total, weight): (0, 0) if no pixel counts.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, equations 3 and 4.

    Example:
      >>> s, t = jnp.zeros((1, 1, 2, 1)), jnp.log(jnp.array([[[[0.75], [0.25]]]]))
      >>> total, weight = channel_wise_distillation(s, t, jnp.ones((1, 1, 2)), temperature=1.0)
      >>> round(float(total), 4), float(weight)
      (0.1308, 1.0)
    """
    weights, student, teacher = _masked(student, teacher, weights)
    seen = weights > 0
    log_w = jnp.log(jnp.where(seen, weights, 1.0))[..., None]
    log_s, log_t = (_log_softmax_over_pixels(x / temperature + log_w, seen) for x in (student, teacher))
    loss = jnp.where(seen[..., None], _divergence(log_t, log_s), 0.0)
    total = temperature**2 / student.shape[-1] * jnp.sum(loss)
    return total, jnp.sum(jnp.any(seen, axis=(1, 2)).astype(jnp.float32))


def _masked(student, teacher, weights):
    """(weights, student, teacher) in float32, 0 where a pixel does not count."""
    seen = weights > 0
    # Replaced, not multiplied by 0: what is not finite must not reach a sum, nor a gradient.
    student, teacher = (jnp.where(seen[..., None], x.astype(jnp.float32), 0.0) for x in (student, teacher))
    return jnp.where(seen, weights.astype(jnp.float32), 0.0), student, lax.stop_gradient(teacher)


def _divergence(log_p, log_q):
    """Terms of KL(p || q); logarithms come in, so a probability that underflows costs 0 and not nan."""
    return jnp.exp(log_p) * (log_p - log_q)


def _log_softmax_over_pixels(x, seen):
    """Log softmax over the height and width of the pixels seen; 0 elsewhere."""
    seen = seen[..., None]
    largest = jnp.max(lax.stop_gradient(x), axis=(1, 2), keepdims=True, where=seen, initial=-jnp.inf)
    x = jnp.where(seen, x - largest, 0.0)
    total = jnp.sum(jnp.where(seen, jnp.exp(x), 0.0), axis=(1, 2), keepdims=True)
    return jnp.where(seen, x - jnp.log(total), 0.0)
