"""Random radiometry on device, in the physical units of each band."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray

from sarjax.augment.keys import row_keys
from sarjax.config import Augment
from sarjax.spec import DatasetSpec, ModalitySpec

SPECKLED = ("amplitude", "intensity", "db")
JITTERED = ("reflectance", "stretched")
_PROPOSALS = 3
_SUMMED = 6  # looks; the product of as many uniform numbers of 16 bits is a normal float32


def radiometry(batch: Mapping[str, Array], key: PRNGKeyArray, options: Augment, spec: DatasetSpec) -> dict[str, Array]:
    """Speckles SAR and jitters optical and stretched bands; images come back as float32 in stored units.

    With G ~ Gamma(L, 1/L), L = options.speckle looks (mean 1, variance 1/L), independent per pixel, band and date:
      intensity  I' = I G            (mean intensity is preserved)
      amplitude  A' = A sqrt(G)      (mean A^2 is preserved)
      db         D' = D + 10 log10 G (the same speckle as on intensity, so the mean of D falls, as it should)
    With a, b ~ U(-j, j), j = options.jitter, one pair per row, modality and *date*, shared by the bands:
      reflectance, stretched  x' = (1 + b) (m + (1 + a) (x - m)), m the band's mean over the valid pixels of the date,
    clipped to [0, largest stored integer] ([0, inf) for float data). Dates get pairs of their own, since two
    acquisitions differ in illumination and stretch: a network must not read that as change. Where the network's input
    is normalised tile by tile, only the clipping of the jitter is left.
    `stretched` bands carry no physical unit, so they get no speckle.

    Args:
      batch: images (b, t, h, w, c) of the modalities of `spec` (missing ones are skipped), `<name>_valid`
        (b, t, h, w), `row` (b,) int32.
      key: one key for the global batch; rows fold their index into it.
      options: see `Augment`.
      spec: says what each band measures.

    Returns:
      The batch with float32 images, 0 at pixels without data.
    """
    keys = row_keys(key, batch)
    out = dict(batch)
    for number, modality in enumerate(spec.modalities):
        if modality.name not in batch:
            continue

        def one_row(image, valid, row_key, number=number, modality=modality):
            return _image(image, valid, jax.random.fold_in(row_key, number), options, modality)

        out[modality.name] = jax.vmap(one_row)(batch[modality.name], batch[f"{modality.name}_valid"], keys)
    return out


def _image(
    image: Num[Array, "t h w c"],
    valid: Num[Array, "t h w"],
    key: PRNGKeyArray,
    options: Augment,
    modality: ModalitySpec,
) -> Float[Array, "t h w c"]:
    top = jnp.iinfo(image.dtype).max if jnp.issubdtype(image.dtype, jnp.integer) else jnp.inf
    k_gain, k_jitter = jax.random.split(key)
    bands = [band.radiometry for band in modality.bands]
    speckled = [n for n, kind in enumerate(bands) if options.speckle and kind in SPECKLED]
    if speckled:
        gains = dict(zip(speckled, unit_gamma(k_gain, options.speckle, (len(speckled), *valid.shape)), strict=True))
    if options.jitter:
        shift = jax.random.uniform(k_jitter, (2, image.shape[0], 1, 1), minval=-1.0, maxval=1.0)
        contrast, brightness = 1.0 + options.jitter * shift
    out = []
    for number, kind in enumerate(bands):
        x = jnp.where(valid > 0, image[..., number].astype(jnp.float32), 0.0)
        if number in speckled:
            x = _speckled(x, gains[number], kind)
        if options.jitter and kind in JITTERED:
            count = jnp.sum(valid > 0, axis=(1, 2), keepdims=True)
            mean = jnp.sum(x, axis=(1, 2), keepdims=True) / jnp.maximum(count, 1)
            x = jnp.clip(brightness * (mean + contrast * (x - mean)), 0.0, top)
        out.append(jnp.where(valid > 0, x, 0.0))
    return jnp.stack(out, axis=-1)


def _speckled(x: Float[Array, "t h w"], gain: Float[Array, "t h w"], kind: str) -> Float[Array, "t h w"]:
    if kind == "db":
        return x + 10.0 * jnp.log10(gain)
    return x * (gain if kind == "intensity" else jnp.sqrt(gain))


def unit_gamma(key: PRNGKeyArray, looks: float, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Gamma(L, 1/L): mean 1, variance 1/L, always positive.

    A few whole looks are what they are: G = -log(u_1 ... u_L) / L, a mean of exponentials. Uniform numbers of 16 bits
    do (an exponential ends at 11.8; its mean is off by 5e-6), and take a fifth of the time of what follows.

    Other L: Marsaglia and Tsang (2000): d = L - 1/3, c = 1 / sqrt(9 d), v = (1 + c z)^3 with z ~ N(0, 1) is accepted if
    log u < z^2 / 2 + d (1 - v + log v); then G = d v / L. For L < 1: G(L) = G(L + 1) u^(1/L).

    `jax.random.gamma` loops until every pixel is accepted (and pixel by pixel on CPUs). At least .95 of the proposals
    are accepted, so three of them, the last one taken as it comes, leave an error in distribution below 1.3e-4.
    """
    if looks in range(1, _SUMMED + 1):
        return _mean_of_exponentials(key, int(looks), shape)
    if looks < 1:
        k_gamma, k_boost = jax.random.split(key)
        boost = jax.random.uniform(k_boost, shape, minval=jnp.finfo(jnp.float32).tiny)
        return (looks + 1) / looks * _by_rejection(k_gamma, looks + 1, shape) * boost ** (1 / looks)
    return _by_rejection(key, looks, shape)


def _mean_of_exponentials(key: PRNGKeyArray, count: int, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    words = jax.random.bits(key, (-(-count // 2), *shape), jnp.uint32)
    product = jnp.ones(shape, jnp.float32)
    for number in range(count):
        half = words[number // 2] >> 16 if number % 2 else words[number // 2] & 0xFFFF
        product *= (half.astype(jnp.float32) + 0.5) * 2.0**-16
    return -jnp.log(product) / count


def _by_rejection(key: PRNGKeyArray, looks: float, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    d = looks - 1 / 3
    c = (9 * d) ** -0.5
    k_z, k_u = jax.random.split(key)
    # All proposals in one draw each: generators are most of what a compiler has to chew here.
    z = jax.random.normal(k_z, (_PROPOSALS, *shape))
    u = jax.random.uniform(k_u, (_PROPOSALS, *shape), minval=jnp.finfo(jnp.float32).tiny)
    v = jnp.maximum(1 + c * z, 1e-3) ** 3
    accepted = (1 + c * z > 0) & (jnp.log(u) < 0.5 * z**2 + d * (1 - v + jnp.log(v)))
    out = v[-1]
    for number in reversed(range(_PROPOSALS - 1)):
        out = jnp.where(accepted[number], v[number], out)
    return d / looks * out
