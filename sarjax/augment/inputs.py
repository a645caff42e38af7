"""From stored bands to what a network sees: normalisation and derived channels, as `config.Inputs` says."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from sarjax.config import Inputs
from sarjax.errors import UserError
from sarjax.spec import DatasetSpec, Statistics


class TileStatistics(NamedTuple):
    """Mean and standard deviation of each tile, date and band over its valid pixels, in stored units."""

    mean: Float[Array, "*b t c"]
    std: Float[Array, "*b t c"]


def tile_statistics(image: Num[Array, "*b t h w c"], valid: Num[Array, "*b t h w"]) -> TileStatistics:
    """Statistics of images (..., t, h, w, c) over their valid pixels: (..., t, c) each; 0 where there are none.

    Deviations from a first mean give both the mean's own rounding error and the spread, and sums run over lines first:
    float32 is then good for whole scenes.
    """
    weight = (valid > 0).astype(jnp.float32)[..., None]

    def total(x):
        return jnp.sum(jnp.sum(x, axis=-2), axis=-2)

    count = jnp.maximum(total(weight), 1.0)
    x = image.astype(jnp.float32)
    # `where`, not a product: whatever is stored at a pixel without data must not get through.
    rough = total(jnp.where(weight > 0, x, 0.0)) / count
    deviation = jnp.where(weight > 0, x - rough[..., None, None, :], 0.0)
    correction = total(deviation) / count
    spread = jnp.where(weight > 0, deviation - correction[..., None, None, :], 0.0)
    return TileStatistics(rough + correction, jnp.sqrt(total(spread**2) / count))


def channel_names(inputs: Inputs, spec: DatasetSpec) -> tuple[str, ...]:
    """A name per channel of `network_inputs`: "sar[0].VV", "sar[0].VV mean 7", "sar.VV difference", in order.

    Raises:
      UserError: `inputs` ask for what the data set does not hold, or contradict themselves.
    """
    dates = dates_of(inputs, spec)
    if not inputs.modalities:
        raise UserError("inputs.modalities is empty: name at least one sensor.")
    bands = []
    for name in inputs.modalities:
        if name not in spec.modality_names:
            raise UserError(
                f"inputs.modalities asks for {name!r}, but data set {spec.name!r} holds only "
                f"{', '.join(map(repr, spec.modality_names))}."
            )
        bands += [(name, band.name) for band in spec.modality(name).bands]
    if inputs.local_mean < 0:
        raise UserError(f"inputs.local_mean is {inputs.local_mean}: a box's side in pixels, or 0 for none.")

    def of(wanted: tuple[int, ...]) -> list[str]:
        """Names of the channels of some dates, without differences."""
        plain = [
            f"{name}[{date}].{band.name}"
            for name in inputs.modalities
            for date in wanted
            for band in spec.modality(name).bands
        ]
        return plain + ([f"{name} mean {inputs.local_mean}" for name in plain] if inputs.local_mean else [])

    if inputs.by_date:
        if inputs.date_difference:
            raise UserError("inputs.date_difference joins the dates that inputs.by_date keeps apart: choose one.")
        return tuple(name for date in dates for name in _repeated(of((date,)), inputs.repeat))
    names = of(dates)
    if inputs.date_difference:
        if len(dates) < 2:
            raise UserError(
                f"inputs.date_difference needs two dates, but only date {dates[0]} of data set {spec.name!r} "
                "is asked for."
            )
        mean = f" mean {inputs.local_mean}" if inputs.local_mean else ""
        names += [f"{name}.{band}{mean} difference" for name, band in bands]
    return _repeated(names, inputs.repeat)


def _repeated(names: list[str], repeat: int) -> tuple[str, ...]:
    """`names` cyclically up to `repeat`; UserError where there are more already."""
    if repeat and repeat < len(names):
        raise UserError(f"inputs.repeat is {repeat}, but there are {len(names)} channels already.")
    return tuple(names[i % len(names)] for i in range(repeat or len(names)))


def channel_count(inputs: Inputs, spec: DatasetSpec) -> int:
    """Channels of `network_inputs`; raises like `channel_names`."""
    return len(channel_names(inputs, spec))


def network_inputs(
    batch: Mapping[str, Array],
    inputs: Inputs,
    spec: DatasetSpec,
    statistics: Statistics | None,
) -> Float[Array, "b h w c"]:
    """The network's input: normalised bands in the order modality, date, band; then derived channels. With `by_date`
    the same for each date in turn.

    x = (stored - mean) / max(std, 1e-3 |mean|, 1e-6), with mean and std of the training split ("dataset") or of the
    valid pixels of each tile, date and band ("tile"): a constant image becomes 0, up to 1e-4. Pixels
    without data are 0 in all channels that they enter.
    local_mean k: mean over the valid pixels of a k x k box, cut off at the borders (an even box reaches one pixel
    further down and right). date_difference: last minus first date asked for, per band, of the local means where
    there are any.

    Args:
      batch: images (b, t, h, w, c), stored dtype or float32 in stored units, and `<name>_valid` (b, t, h, w). With
        "tile" it may hold `<name>_mean` and `<name>_std` (b, t, c) in place of each tile's own: windows that share the
        statistics of their scene are normalised exactly as the whole scene is.
      inputs: see `Inputs`.
      spec: of the data set.
      statistics: of the training split; unused (None will do) with "tile".

    Returns:
      (b, h, w, channel_count) float32.

    Raises:
      UserError: like `channel_names`; or the batch lacks a modality.
    """
    names, dates = channel_names(inputs, spec), dates_of(inputs, spec)
    plain, means, differences = [], [], []
    for name in inputs.modalities:
        if name not in batch:
            raise UserError(f"the network reads {name!r}, but this batch holds only {', '.join(sorted(batch))}.")
        given = (batch[f"{name}_mean"], batch[f"{name}_std"]) if f"{name}_mean" in batch else None
        image, valid = _normalised(batch[name], batch[f"{name}_valid"], name, inputs, statistics, given)
        image = jnp.stack([image[:, t] for t in dates], axis=1)
        valid = jnp.stack([valid[:, t] for t in dates], axis=1)
        plain.append(image)
        if inputs.local_mean:
            image = local_mean(image, valid, inputs.local_mean)
            means.append(image)
        if inputs.date_difference:
            both = valid[:, -1] & valid[:, 0]
            differences.append(jnp.where(both[..., None], image[:, -1] - image[:, 0], 0.0))
    if inputs.by_date:
        groups = [[x[:, t] for x in [*plain, *means]] for t in range(len(dates))]
    else:
        groups = [[x[:, t] for x in [*plain, *means] for t in range(len(dates))] + differences]
    width, out = len(names) // len(groups), []
    for channels in groups:
        once = jnp.concatenate(channels, axis=-1)
        out.append(jnp.concatenate([once] * -(-width // once.shape[-1]), axis=-1)[..., :width])
    return jnp.concatenate(out, axis=-1)


def local_mean(x: Float[Array, "*b h w c"], valid: Num[Array, "*b h w"], side: int) -> Float[Array, "*b h w c"]:
    """Mean over the valid pixels of a side x side box around each pixel; 0 at pixels that are not valid themselves.

    Sums over windows, not differences of cumulative sums: those cancel in float32 and depend on where a window starts.
    """
    weight = (valid > 0).astype(jnp.float32)[..., None]
    count = _box_sum(weight, side)
    return jnp.where(weight > 0, _box_sum(x * weight, side) / jnp.maximum(count, 1.0), 0.0)


def _box_sum(x: Float[Array, "*b h w c"], side: int) -> Float[Array, "*b h w c"]:
    before, after = (side - 1) // 2, side // 2
    for axis in (x.ndim - 3, x.ndim - 2):
        window, padding = [1] * x.ndim, [(0, 0)] * x.ndim
        window[axis], padding[axis] = side, (before, after)
        x = lax.reduce_window(x, 0.0, lax.add, tuple(window), (1,) * x.ndim, tuple(padding))
    return x


def dates_of(inputs: Inputs, spec: DatasetSpec) -> tuple[int, ...]:
    """Indices of the dates that `inputs` ask for; UserError where the data set does not have them."""
    if inputs.dates == "all":
        return tuple(range(spec.dates))
    for date in inputs.dates:
        if not 0 <= date < spec.dates:
            raise UserError(
                f"inputs.dates asks for date {date}, but data set {spec.name!r} has {spec.dates} (counted from 0)."
            )
    if not inputs.dates:
        raise UserError(f"inputs.dates is empty: data set {spec.name!r} has dates 0 to {spec.dates - 1}.")
    return tuple(inputs.dates)


def has_data(batch: Mapping[str, Array], inputs: Inputs, spec: DatasetSpec) -> Bool[Array, "b h w"]:
    """Where every sensor that `inputs` ask for has data at every date that they ask for."""
    dates = np.asarray(dates_of(inputs, spec))
    return functools.reduce(jnp.logical_and, [(batch[f"{m}_valid"][:, dates] > 0).all(1) for m in inputs.modalities])


def _normalised(image, valid, name, inputs, statistics, given):
    """(x - mean) / std with zeros where there are no data, and the mask as bool."""
    if inputs.normalisation == "dataset":
        mean, std = (jnp.asarray(v, jnp.float32) for v in (statistics.bands[name].mean, statistics.bands[name].std))
    else:
        mean, std = given if given is not None else tile_statistics(image, valid)
        mean, std = (jnp.asarray(v, jnp.float32)[..., None, None, :] for v in (mean, std))
    # Relative to the mean, as that is how float32 rounds: a constant image's computed std is about 1e-7 |mean|.
    std = jnp.maximum(std, jnp.maximum(1e-3 * jnp.abs(mean), 1e-6))
    keep = valid > 0
    return jnp.where(keep[..., None], (image.astype(jnp.float32) - mean) / std, 0.0), keep
