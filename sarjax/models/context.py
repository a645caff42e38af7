"""How far a network looks: which input pixels can change an output pixel, computed from its layers."""

import math
from typing import NamedTuple


class FieldOfView(NamedTuple):
    """What a network asks of the windows that a large image is cut into.

    alignment: offsets and sides of windows must be multiples of it; the network then sees the same grid of strides
    and patches in each window as in the whole image. radius: an output pixel does not depend on pixels that are
    further away than this, along either axis; None = it may depend on the whole image.
    """

    alignment: int
    radius: int | None

    def grown(self, by: int) -> "FieldOfView":
        """The field of view where each pixel of the network's input itself looks `by` pixels around."""
        return self if self.radius is None else self._replace(radius=self.radius + by)


class Extent(NamedTuple):
    """Which pixels a cell of a feature map reads: cell i those from stride * i - before to stride * i + after.

    Exact for images whose sides are multiples of all strides and patches; one axis stands for both.
    """

    stride: int = 1
    before: int = 0
    after: int = 0

    def convolution(self, kernel: int, stride: int = 1, dilation: int = 1) -> "Extent":
        """After a convolution or pool of an odd `kernel`, padded by dilation * (kernel - 1) / 2 on both sides."""
        reach = self.stride * dilation * (kernel // 2)
        return Extent(self.stride * stride, self.before + reach, self.after + reach)

    def patches(self, side: int) -> "Extent":
        """After the mean of patches of side x side cells that do not overlap."""
        return Extent(self.stride * side, self.before, self.after + self.stride * (side - 1))

    def upsampled(self, stride: int) -> "Extent":
        """After bilinear interpolation (pixel centres at half-integers) to the finer `stride`, a divisor of ours.

        With f = our stride / stride, the fine cell f * i + m lies between the coarse cells i and i + 1 for m from
        ceil(f / 2) to floor((3 f - 2) / 2).
        """
        factor = self.stride // stride
        first, last = (factor + 1) // 2, (3 * factor - 2) // 2
        return Extent(stride, self.before + stride * last, self.after + self.stride - stride * first)

    def joined(self, other: "Extent") -> "Extent":
        """Of the sum or product of two maps of the same stride."""
        return Extent(self.stride, max(self.before, other.before), max(self.after, other.after))

    def field_of_view(self, *periods: int) -> FieldOfView:
        """Of the output, at stride 1; periods: strides and patch sides of the network, in pixels."""
        return FieldOfView(math.lcm(*periods), max(self.before, self.after))
