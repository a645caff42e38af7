"""How an image is cut into overlapping windows, and what share of each window every pixel takes. Pure numpy.

The image is thought of as padded below and to the right, with no-data, to multiples of the network's alignment;
"inference on the whole image" is inference on that. Everything is separable: an axis at a time.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView

BLOCK = 256  # windows advance by multiples of it where nothing else is asked for: a GeoTIFF's blocks are filled at once
SIDE = 1024  # of a window, at least, where a network is local; GPUs are busy with it, and it fits everywhere


class Windows(NamedTuple):
    """How large windows are: their side, and how far each reaches beyond the part it answers for, in pixels."""

    side: int
    overlap: int


class Axis(NamedTuple):
    """One axis of an image: its size, its size when padded, the windows' length, and where each begins."""

    size: int
    padded: int
    length: int
    origins: tuple[int, ...]

    def own(self, i: int) -> tuple[int, int]:
        """Start and end of what is finished once window i is: up to where the next begins, cut off at the size."""
        end = self.origins[i + 1] if i + 1 < len(self.origins) else self.padded
        return self.origins[i], min(end, self.size)


def choose(context: FieldOfView, trained: int, side: int = 0, overlap: int | None = None) -> Windows:
    """The windows for a network of this `context`, as asked for, else by default.

    Local networks: an overlap of the radius, so that windows give what the whole image would, and a side of which at
    least half is no overlap; where a side is asked for that is too small for both, as much overlap as leaves half of
    it. Global ones see windows of `trained` pixels, the side that they were trained on, and a quarter of it as overlap.

    Raises:
      UserError: side, or twice the overlap, is no multiple of the alignment; or the overlap leaves nothing.
    """
    alignment, radius = context
    if side < 0 or side % alignment:
        near = max(1, round(side / alignment)) * alignment
        raise UserError(f"--window is {side}, but this network needs a multiple of {alignment}, such as {near}.")
    if overlap is not None and (overlap < 0 or 2 * overlap % alignment):
        near = round(max(overlap, 0) / alignment) * alignment
        raise UserError(
            f"--overlap is {overlap}, but twice it must be a multiple of {alignment} for this network: {near} is."
        )
    if radius is None:
        side = side or max(1, trained // alignment) * alignment
        if overlap is None:
            step = max(1, side // 2 // alignment) * alignment
            overlap = (side - step) // 2
    else:
        if overlap is None:
            overlap = -(-radius // alignment) * alignment
            if side and side < 4 * overlap:
                # A side that cannot hold the radius and be half its own: windows may show, but work stays bounded.
                overlap = (side - -(-side // (2 * alignment)) * alignment) // 2
        if not side:
            period = math.lcm(BLOCK, alignment)
            side = 2 * overlap + -(-max(SIDE - 2 * overlap, 2 * overlap) // period) * period
    if 2 * overlap >= side:
        raise UserError(
            f"--overlap is {overlap} in windows of {side} pixels, which leaves nothing between; below {side // 2} "
            "would be accepted, or a larger --window."
        )
    return Windows(side, overlap)


def cut(size: int, windows: Windows, alignment: int) -> Axis:
    """The windows along an axis of `size` pixels: a fixed step, the last one shifted back into the padded image."""
    padded = -(-size // alignment) * alignment
    length = min(windows.side, padded)
    origins = list(range(0, padded - length, windows.side - 2 * windows.overlap))
    return Axis(size, padded, length, (*origins, padded - length))


def shares(axis: Axis, overlap: int, radius: int | None) -> Float[np.ndarray, "n length"]:
    """What share each pixel of each window has in the result; the shares of one pixel add up to 1.

    w = clip((d + 1/2 - r) / max(2 overlap - 2 r, 1), 0, 1), divided by its sum over windows, with d the distance in
    pixels to the nearest border of the window inside the image, and r = radius where the overlap covers it, else 0:
    pixels that depend on what lies outside of the window then count for nothing.
    """
    r = radius if radius is not None and overlap >= radius else 0
    position = np.arange(axis.length)
    raw = np.empty((len(axis.origins), axis.length))
    for i, origin in enumerate(axis.origins):
        before = position if origin else np.inf
        after = position[::-1] if origin + axis.length < axis.padded else np.inf
        distance = np.broadcast_to(np.minimum(before, after), position.shape)
        raw[i] = np.clip((distance + 0.5 - r) / max(2 * overlap - 2 * r, 1), 0, 1)
    total = np.zeros(axis.padded)
    for origin, row in zip(axis.origins, raw, strict=True):
        total[origin : origin + axis.length] += row
    for origin, row in zip(axis.origins, raw, strict=True):
        row /= total[origin : origin + axis.length]
    return raw
