"""How an image is cut into overlapping windows, and what share of each window every pixel takes. Pure numpy.

The image is thought of as padded below and to the right, with no-data, to multiples of the network's alignment;
"inference on the whole image" is inference on that. Everything is separable: an axis at a time.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView

BLOCK = 256  # windows advance by multiples of it where nothing else is asked for: a GeoTIFF's blocks are filled at once
SIDE = 1024  # of a window, at least, where a network is local; GPUs are busy with it, and it fits everywhere
LARGE = 2304  # up to here a side grows for the sake of its overlap, which is computed and thrown away


class Windows(NamedTuple):
    """How large windows are: their side, and how far each reaches beyond the part it answers for, in pixels."""

    side: int
    overlap: int

    def cover(self, radius: int | None) -> bool:
        """Whether what a window answers for does not depend on what lies outside of it."""
        return radius is not None and self.overlap >= radius


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
    least half is no overlap, or four fifths where that is not too large; where a side is asked for that is too small,
    as much overlap as leaves half of it. Global ones see windows of `trained` pixels, the side that they were trained
    on, and a quarter of it as overlap.

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
            own = max(SIDE - 2 * overlap, 2 * overlap, min(8 * overlap, LARGE - 2 * overlap))
            side = 2 * overlap + -(-own // period) * period
    if 2 * overlap >= side:
        raise UserError(
            f"--overlap is {overlap} in windows of {side} pixels, which leaves nothing between; below {side // 2} "
            "would be accepted, or a larger --window."
        )
    return Windows(side, overlap)


def grid(height: int, width: int, windows: Windows, context: FieldOfView, together: int = 1) -> tuple[Axis, Axis]:
    """The windows of an image, by rows and by columns, of which `together` make a batch.

    Where the network is local and the overlap covers its radius, windows may be smaller than they are asked to be
    without a change of the result: they are cut so that least is computed, in steps of whole blocks of the map where
    the step that was asked for is one. Else they have the side that was asked for.
    """
    if not windows.cover(context.radius):
        return cut(height, windows, context.alignment), cut(width, windows, context.alignment)
    rows, columns = (_cuts(n, windows, context.alignment, together) for n in (height, width))

    def cost(pair: tuple[Axis, Axis]) -> tuple[int, int]:
        count = len(pair[0].origins) * len(pair[1].origins)
        return -(-count // together) * together * pair[0].length * pair[1].length, count

    return min(((r, c) for r in rows for c in columns), key=cost)


def cut(size: int, windows: Windows, alignment: int) -> Axis:
    """The windows along an axis of `size` pixels: a fixed step, the last one shifted back into the padded image."""
    padded = -(-size // alignment) * alignment
    length = min(windows.side, padded)
    origins = list(range(0, padded - length, windows.side - 2 * windows.overlap))
    return Axis(size, padded, length, (*origins, padded - length))


def _cuts(size: int, windows: Windows, alignment: int, more: int) -> list[Axis]:
    """Ways to cut an axis: into as few windows as their side allows, and into up to `more` more, which are shorter."""
    plain = cut(size, windows, alignment)
    step, inner = windows.side - 2 * windows.overlap, plain.padded - 2 * windows.overlap
    unit = math.gcd(step, math.lcm(BLOCK, alignment))
    fewest = max(1, -(-inner // step))
    steps = {-(-inner // (n * unit)) * unit for n in range(fewest, fewest + more + 1)} if inner > 0 else set()
    return [plain] + [
        cut(size, Windows(step + 2 * windows.overlap, windows.overlap), alignment) for step in sorted(steps)
    ]


def shares(axis: Axis, overlap: int, radius: int | None) -> Float[np.ndarray, "n length"]:
    """What share each pixel of each window has in the result; the shares of one pixel add up to 1.

    Where the overlap covers the radius, windows agree on what they share: the pixels up to the middle of it are the one
    window's, the rest the other's, and shares are 0 or 1. Elsewhere they are w = min((d + 1/2) / max(2 overlap, 1), 1),
    divided by its sum over windows, with d the distance in pixels to the window's nearest border inside the image.
    """
    position = np.arange(axis.length)
    raw = np.empty((len(axis.origins), axis.length))
    if Windows(axis.length, overlap).cover(radius):
        middles = [(before + axis.length + after) // 2 for before, after in pairwise(axis.origins)]
        for origin, row, start, end in zip(axis.origins, raw, (0, *middles), (*middles, axis.padded), strict=True):
            row[:] = (start <= origin + position) & (origin + position < end)
        return raw
    for i, origin in enumerate(axis.origins):
        before = position if origin else np.inf
        after = position[::-1] if origin + axis.length < axis.padded else np.inf
        distance = np.broadcast_to(np.minimum(before, after), position.shape)
        raw[i] = np.minimum((distance + 0.5) / max(2 * overlap, 1), 1)
    total = np.zeros(axis.padded)
    for origin, row in zip(axis.origins, raw, strict=True):
        total[origin : origin + axis.length] += row
    for origin, row in zip(axis.origins, raw, strict=True):
        row /= total[origin : origin + axis.length]
    return raw
