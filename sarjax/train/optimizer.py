"""Optimizers and learning-rate schedules, from optax's parts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sarjax import config


def learning_rate(options: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate at a step: linear warm-up to the peak, then poly, cosine or constant over what is left."""
    warmup = min(round(options.warmup * steps), max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    if options.schedule == "poly":
        decay = optax.polynomial_schedule(options.learning_rate, 0.0, options.power, rest)
    elif options.schedule == "cosine":
        decay = optax.cosine_decay_schedule(options.learning_rate, rest)
    else:
        decay = optax.constant_schedule(options.learning_rate)
    if not warmup:
        return decay
    # (step + 1) / warmup: a first step of rate 0 would be a step for nothing.
    rise = optax.linear_schedule(options.learning_rate / warmup, options.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def decayed(params: Any) -> Any:
    """Which leaves weight decay applies to: kernels, not norms and biases."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def make_optimizer(options: config.Optimizer) -> optax.GradientTransformation:
    """Gradient -> direction; the step multiplies it by -learning_rate(step).

    The rate is a function of the run's step, not of the optimizer's own count, which a skipped step leaves behind.
    """
    decay = optax.add_decayed_weights(options.weight_decay, mask=decayed)
    clip = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    if options.name == "sgd":
        return optax.chain(*clip, decay, optax.trace(options.momentum, nesterov=options.nesterov))
    return optax.chain(*clip, optax.scale_by_adam(), decay)
