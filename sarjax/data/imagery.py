"""One sensor's image in a raster file, by window, as the records hold it: the only way from files to stored bands.

Builders and `sarjax predict` both come here, so that a map is made from exactly what the network was trained on. Which
pixels saw nothing, and what transforms give, does not depend on the window: each is read with the margin that it needs.
"""

import functools
from collections.abc import Sequence

import numpy as np

from sarjax.errors import UserError
from sarjax.raster import Info, Reader, Window
from sarjax.spec import ModalitySpec, Transform


def stored_dtype(dtype: str) -> str:
    """The dtype that records keep numbers of a file's `dtype` in: uint8 and uint16 as they are, else float32.

    UserError for what float32 would not hold exactly or nearly (64 bits, 32-bit whole numbers).
    """
    kept = {"uint8": "uint8", "uint16": "uint16", "int8": "float32", "int16": "float32", "float32": "float32"}
    if dtype not in kept:
        raise UserError(f"{dtype} numbers cannot be kept: uint8, uint16, int16 and float32 are accepted.")
    return kept[dtype]


def check_image(path: object, info: Info, modality: ModalitySpec) -> None:
    """UserError, in one sentence, where a file's bands or dtype are not those of `modality`."""
    if info.bands != len(modality.bands):
        raise UserError(
            f"{path} has {info.bands} bands, but {len(modality.bands)} of {modality.name} are expected: "
            f"{', '.join(band.name for band in modality.bands)}."
        )
    if modality.transforms:
        return  # they take any number and give float32
    try:
        kept = stored_dtype(info.dtype)
    except UserError as e:
        raise UserError(f"{path} does not fit: {e}") from e
    if kept != modality.dtype:
        raise UserError(f"{path} holds {info.dtype}, but {modality.dtype} is expected for {modality.name}.")


def margin(modality: ModalitySpec) -> int:
    """Pixels around a window that decide what is in it."""
    gap = modality.smallest_gap if modality.no_data is not None and modality.smallest_gap > 1 else 0
    # Twice the filter's reach: a pixel without data takes the mean of its surroundings first.
    return gap + sum(2 * (t.window // 2) for t in modality.transforms if t.name == "lee")


def read_image(reader: Reader, modality: ModalitySpec, window: Window | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(image (h, w, c) in the modality's dtype, valid (h, w) bool) of `window`, which must lie inside the raster.

    Pixels that are not valid are 0. Valid = declared by the file (whole numbers: in any band; real ones: in all),
    no NaN or infinity in any band, and not in a gap, as `ModalitySpec` says.
    """
    row, column, height, width = window
    m, info = margin(modality), reader.info
    top, left = max(0, row - m), max(0, column - m)
    wide = Window(top, left, min(info.height, row + height + m) - top, min(info.width, column + width + m) - left)
    image, declared = reader.read(wide), reader.declared(wide)
    if image.dtype.kind == "f":
        valid = _in_all_bands(declared) & _in_all_bands(np.isfinite(image))
    else:
        valid = functools.reduce(np.logical_or, np.moveaxis(declared, -1, 0))
    if modality.no_data is not None:
        valid &= ~gaps(_in_all_bands(image == modality.no_data), modality.smallest_gap)
    for transform in modality.transforms:
        image, valid = _APPLY[transform.name](image.astype(np.float32), valid, transform)
    part = slice(row - top, row - top + height), slice(column - left, column - left + width)
    image, valid = image[part], valid[part]
    if not valid.all():
        image = np.where(valid[..., None], image, 0)
    return image.astype(modality.dtype, copy=False), valid


def _in_all_bands(x: np.ndarray) -> np.ndarray:
    """(h, w) bool from (h, w, c), band by band: along a last axis as short as this `all` takes many times as long."""
    return functools.reduce(np.logical_and, np.moveaxis(x, -1, 0))


def gaps(candidates: np.ndarray, smallest: int) -> np.ndarray:
    """(h, w) bool: those True pixels of `candidates` (h, w) that lie in an 8-connected region of >= `smallest`."""
    if smallest <= 1 or not candidates.any():
        return candidates
    from scipy import ndimage

    regions, count = ndimage.label(candidates, np.ones((3, 3)))
    large = np.bincount(regions.ravel(), minlength=count + 1) >= smallest
    large[0] = False
    return large[regions]


def lee(image: np.ndarray, valid: np.ndarray, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """Lee's filter for multiplicative speckle (Lee, IEEE TPAMI 1980; as in Lopes et al., TGRS 1990), band by band.

    mean + k (x - mean), k = max(0, 1 - Cu^2 / Cx^2), Cx^2 = variance / mean^2 in the window; Cu^2 = 1 / looks of an
    intensity and .273 / looks (4 / pi - 1, about) of an amplitude. That is the local Wiener filter with the noise power
    Cu^2 mean^2. Pixels without data take the mean of the valid ones around them before it, the scene's edge is
    reflected. Computed in float64.
    """
    side, reach = transform.window, transform.window // 2
    square = (1.0 if transform.quantity == "intensity" else 4 / np.pi - 1) / transform.looks
    inner = slice(reach, reach + image.shape[0]), slice(reach, reach + image.shape[1])
    count = np.maximum(_sums(valid.astype(np.float64), side), 1)
    out = np.empty_like(image)
    for c in range(image.shape[-1]):
        x = np.where(valid, image[..., c], 0).astype(np.float64)
        x = np.pad(np.where(valid, x, _sums(x, side) / count), reach, mode="symmetric")
        mean = _sums(x, side) / side**2
        variance = _sums(x * x, side) / side**2 - mean**2
        noise = square * mean**2
        with np.errstate(divide="ignore", invalid="ignore"):  # a constant window: the mean is taken
            k = np.where(variance > noise, 1 - noise / variance, 0)
        out[..., c] = (mean + k * (x - mean))[inner]
    return out, valid


def _sums(x: np.ndarray, side: int) -> np.ndarray:
    """(h, w) sums of x (h, w) over `side` x `side` pixels, 0 beyond the edge.

    Every pixel's terms are added in the same order. Running sums (`uniform_filter`) and Fourier transforms
    (`scipy.signal.wiener`) are rounded by what lies outside of the window, a bright target far off: then a tile would
    differ from the same part of a larger image.
    """
    from scipy import ndimage

    rows = ndimage.correlate1d(x, np.ones(side), axis=0, mode="constant")
    return ndimage.correlate1d(rows, np.ones(side), axis=1, mode="constant")


def decibel(image: np.ndarray, valid: np.ndarray, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """10 log10 of an intensity, 20 log10 of an amplitude; pixels at or below 0 in any band become no-data."""
    valid = valid & _in_all_bands(image > 0)
    factor = np.float32(10 if transform.quantity == "intensity" else 20)
    return factor * np.log10(np.where(image > 0, image, np.float32(1))), valid


_APPLY = {"lee": lee, "db": decibel}
