"""Networks for change detection: one encoder for both dates, and a decoder that sees the difference of their features.

`ChangeSegmenter` is our design for FRD (Wang et al., whose networks are not public), any ResNet wide or narrow;
`FCSiamDiffSegmenter` is the classical baseline (Daudt et al., "Fully Convolutional Siamese Networks for Change
Detection", ICIP 2018).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.context import Extent, FieldOfView
from sarjax.models.dhfa import DHFASegmenter
from sarjax.models.layers import BatchNorm, MaxPool, ReLU, conv, kaiming_fan_in, kaiming_fan_out, scaled
from sarjax.models.segmenters import Prediction, build_encoder, by_stride, resized
from sarjax.options import Change, FCSiamDiff, NetworkOptions

DATES = Change.DATES
Features = dict[int, Float[Array, "b _ _ c"]]
ByDate = dict[int, Float[Array, "b 2 _ _ c"]]


def both_dates(x: Float[Array, "b h w 2c"]) -> Float[Array, "2b h w c"]:
    """The two dates of each row, which follow one another on channels, as rows: so one batch-norm sees both."""
    if x.shape[-1] % DATES:
        raise UserError(
            f"a network that compares {DATES} dates cannot read {x.shape[-1]} channels: an even number fits."
        )
    b, h, w, c = x.shape
    return jnp.moveaxis(x.reshape(b, h, w, DATES, c // DATES), 3, 1).reshape(DATES * b, h, w, c // DATES)


def dates_apart(features: Features) -> ByDate:
    """{stride: (b, 2, h', w', c)} of the features of `both_dates`."""
    return {stride: f.reshape(-1, DATES, *f.shape[1:]) for stride, f in features.items()}


def differences(features: ByDate, signed: bool = False) -> Features:
    """|F_2 - F_1|, no matter which date came first, or F_2 - F_1."""
    found = {stride: f[:, 1] - f[:, 0] for stride, f in features.items()}
    return found if signed else {stride: jnp.abs(d) for stride, d in found.items()}


class ChangeSegmenter(DHFASegmenter):
    """A ResNet's features E of both dates, their difference at each stride, and a feature pyramid and head on that.

        D_i = |E_i(date 2) - E_i(date 1)|, or without | | where `signed`
        P_n = relu bn conv3x3(D_n), the coarsest;   P_i = relu bn conv1x1(D_i) + up P_{i+1}
        U = relu bn conv3x3[relu bn conv3x3(P_1), up .., up P_n];   logits = up(conv1x1(U))

    This is DHFA-Net's decoder without offsets and without means of the whole image, so it looks no further than its
    convolutions. `features` and `encode` are the D_i; `by_date` are the E_i.
    """

    signed: bool = False

    @property
    def context(self) -> FieldOfView:
        extents = self.encoder.extents
        last = {self.encoder.strides[stage]: extent for stage, extent in extents.items()}
        *finer, coarsest = sorted(last)
        level = last[coarsest].convolution(3)
        maps = [level]
        for stride in reversed(finer):
            level = last[stride].joined(level.upsampled(stride))
            maps.append(level.convolution(3))
        joined = maps[-1]
        for level in maps[:-1]:
            joined = joined.joined(level.upsampled(joined.stride))
        return joined.convolution(3).upsampled(1).field_of_view(coarsest)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        features = self._by_date(x, train)
        return self.decode(differences(features, self.signed), x.shape[1:3], train)._replace(by_date=features)

    def encode(self, x: Float[Array, "b h w c"], train: bool) -> Features:
        return differences(self._by_date(x, train), self.signed)

    def _by_date(self, x: Float[Array, "b h w c"], train: bool) -> ByDate:
        return dates_apart(by_stride(self.encoder(both_dates(x), train), self.encoder.strides))


def build_change(options: Change, num_classes: int, dtype: Any) -> ChangeSegmenter:
    if options.channels < 1:
        raise UserError(f"channels is {options.channels}, but should be a whole number from 1.")
    return ChangeSegmenter(
        encoder=build_encoder(options, 4, dtype),
        channels=scaled(options.channels, options.width),
        bins=(),
        alignment="none",
        corner_aligned=False,
        fuse=False,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        signed=options.difference == "signed",
    )


# Outputs of the 3x3 convolutions of each stage, before width; the decoder goes back through the same.
STAGES = ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128))


class _Block(nn.Module):
    """relu bn conv3x3 for each of `channels`, the size staying; init: of the kernels."""

    channels: tuple[int, ...]
    init: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w k"]:
        for i, channels in enumerate(self.channels):
            x = conv(channels, 3, init=self.init, dtype=self.dtype, name=f"conv_{i}")(x)
            x = ReLU(name=f"relu_{i}")(BatchNorm(dtype=self.dtype, name=f"bn_{i}")(x, train))
        return x


class FCSiamDiffSegmenter(nn.Module):
    """A U-Net of four stages (`STAGES`) for both dates; the decoder starts from the later date's deepest features.

        F_i = block_i(pool F_{i-1});   Y_5 = pool F_4 of date 2;   Y_i = block'_i[up Y_{i+1}, |F_i(1) - F_i(2)|]

    up: a learnt 3x3 transposed convolution; logits: conv3x3(Y_1). Layers and channels are the public code's. Other than
    there, convolutions in front of a batch-norm have no bias, there is no dropout, one batch-norm sees both dates at
    once, and kernels start as those of our other networks. Maps of odd height or width have their last row or column
    twice before a pool. The prediction is not symmetric in the dates.
    """

    channels: tuple[tuple[int, ...], ...]
    num_classes: int
    dtype: Any = jnp.float32
    classifies: ClassVar[bool] = True

    def setup(self):
        def up(channels: int) -> nn.ConvTranspose:
            # PyTorch's padding 1 and output padding 1: the size doubles.
            padding = ((1, 2), (1, 2))
            return nn.ConvTranspose(channels, (3, 3), (2, 2), padding, kernel_init=kaiming_fan_in, dtype=self.dtype)

        self.stages = [_Block(c, kaiming_fan_out, self.dtype) for c in self.channels]
        self.pool = MaxPool(2, 2, 0)
        self.ups = [up(c[-1]) for c in self.channels]
        # Each block of the decoder ends with what the next finer stage has; the finest with the classifier.
        ends = [(), *((c[-1],) for c in self.channels[:-1])]
        self.back = [
            _Block((*reversed(c[1:]), *end), kaiming_fan_in, self.dtype)
            for c, end in zip(self.channels, ends, strict=True)
        ]
        self.classifier = conv(self.num_classes, 3, bias=True, init=kaiming_fan_in, dtype=self.dtype)

    @property
    def context(self) -> FieldOfView:
        extents, extent = [], Extent()
        for channels in self.channels:
            for _ in channels:
                extent = extent.convolution(3)
            extents.append(extent)
            extent = _pooled(extent)
        for own, channels in zip(reversed(extents), reversed(self.channels), strict=True):
            extent = own.joined(_doubled(extent))
            for _ in channels:
                extent = extent.convolution(3)
        return extent.field_of_view(2 ** len(self.channels))

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        features = self._by_date(x, train)
        skips = differences(features)
        deepest = features[max(features)][:, 1]
        y = self.pool(_even(deepest))
        for stride, up, block in zip(reversed(skips), reversed(self.ups), reversed(self.back), strict=True):
            h, w = skips[stride].shape[1:3]
            y = block(jnp.concatenate([up(y)[:, :h, :w], skips[stride]], -1), train)
        return Prediction(self.classify(y, x.shape[1:3]), None, skips, skips, y, features)

    def encode(self, x: Float[Array, "b h w c"], train: bool) -> Features:
        return differences(self._by_date(x, train))

    def classify(self, embedding: Float[Array, "b _ _ c"], size: tuple[int, int]) -> Float[Array, "b h w k"]:
        return resized(self.classifier(embedding), size)

    def _by_date(self, x: Float[Array, "b h w c"], train: bool) -> ByDate:
        y, features = both_dates(x).astype(self.dtype), {}
        for i, stage in enumerate(self.stages):
            y = stage(self.pool(_even(y)) if i else y, train)
            features[2**i] = y
        return dates_apart(features)


def _even(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
    """With an even height and width: the last row and column twice where they are odd."""
    h, w = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")


def _pooled(extent: Extent) -> Extent:
    """After the largest of 2 x 2 cells that do not overlap."""
    return extent.patches(2)


def _doubled(extent: Extent) -> Extent:
    """After the transposed convolution: output 2 i reads cell i, output 2 i + 1 cells i and i + 1."""
    stride = extent.stride // 2
    return Extent(stride, extent.before + stride, extent.after + stride)


def build_fc_siam_diff(options: FCSiamDiff, num_classes: int, dtype: Any) -> FCSiamDiffSegmenter:
    for field in dataclasses.fields(NetworkOptions):
        if field.name != "width" and getattr(options, field.name) != field.default:
            raise UserError(f"network.{field.name} is of a ResNet, which {options.NAME!r} does not have; leave it out.")
    channels = tuple(tuple(scaled(c, options.width) for c in stage) for stage in STAGES)
    return FCSiamDiffSegmenter(channels, num_classes, jnp.dtype(dtype))
