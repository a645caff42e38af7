"""DHFA-Net's network (Gao et al.): a feature pyramid whose levels are aligned by learnt offsets (HFAM).

The source describes the module in words alone; the warp is SFNet's flow alignment (Li et al., ECCV 2020), the rest is
our design. Teacher and student are this network with parameters of their own.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sarjax.errors import UserError
from sarjax.models.context import FieldOfView
from sarjax.models.layers import AdaptiveAvgPool, ConvNormReLU, ReLU, conv, kaiming_fan_in, scaled
from sarjax.models.resampling import grid_sample, offset_sample, resize_bilinear
from sarjax.models.segmenters import PixelClassifier, Prediction, build_encoder, whole_image
from sarjax.options import DHFA


class FlowAlignment(nn.Module):
    """`coarse` sampled for each cell of `fine` at its own place plus offsets that both predict.

        D = conv3x3[up(W_h coarse), W_l fine],   y(p) = coarse(place of p + D(p))

    hidden: channels of W_h and W_l, 1x1 without bias. D: (b, h, w, 2), x and y, without bias and 0 at first, so the
    module starts as bilinear upsampling. Offsets and positions are float32 in any dtype.
    corner_aligned: False: half-pixel positions, D in cells of `coarse`, border cells repeated (`offset_sample`), so a
    window agrees with the whole scene. True: SFNet's AlignedModule (`flow_sample`).
    """

    hidden: int
    corner_aligned: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, coarse: Float[Array, "b ch cw c"], fine: Float[Array, "b h w k"]) -> Float[Array, "b h w c"]:
        high = conv(self.hidden, init=kaiming_fan_in, dtype=self.dtype, name="high")(coarse)
        high = resize_bilinear(high, fine.shape[1:3], align_corners=self.corner_aligned)
        low = conv(self.hidden, init=kaiming_fan_in, dtype=self.dtype, name="low")(fine)
        # In float32: of 5.03 cells bfloat16 would make 5.
        offsets = conv(2, 3, init=nn.initializers.zeros, name="offsets")(jnp.concatenate([high, low], -1))
        return (flow_sample if self.corner_aligned else offset_sample)(coarse, offsets)


def flow_sample(x: Float[Array, "b h w c"], flow: Float[Array, "b oh ow 2"]) -> Float[Array, "b oh ow c"]:
    """Bilinear samples of `x` on a grid that maps corners on corners, moved by `flow`; outside of the map is 0.

        y[i, j] = x(2 j / (ow - 1) - 1 + flow_x / ow,  2 i / (oh - 1) - 1 + flow_y / oh),  -1..1 between the corners

    So a flow of 1 is about half a cell of the result. Equal to the `flow_warp` of SFNet's public code.
    """
    oh, ow = flow.shape[1:3]

    def corners(n):
        return 2 * lax.iota(jnp.float32, n) / jnp.maximum(n - 1, 1) - 1

    u = corners(ow) + flow[..., 0] / ow
    v = corners(oh)[:, None] + flow[..., 1] / oh
    return grid_sample(x, jnp.stack([u, v], -1), align_corners=True)


class PyramidPooling(nn.Module):
    """relu bn conv3x3([up(relu conv1x1(means over n x n bins)) for n in bins] + [x]).

    A level has a quarter of `channels`, and a bias instead of a norm: a bin of 1 has one value per image.
    """

    bins: tuple[int, ...]
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w k"]:
        levels = []
        for i, side in enumerate(self.bins):
            means = AdaptiveAvgPool(side, name=f"pool_{i}")(x)
            level = conv(
                max(1, self.channels // 4), bias=True, init=kaiming_fan_in, dtype=self.dtype, name=f"level_{i}"
            )
            levels.append(resize_bilinear(ReLU(name=f"relu_{i}")(level(means)), x.shape[1:3], bins=True))
        return ConvNormReLU(self.channels, 3, dtype=self.dtype, name="project")(
            jnp.concatenate([*levels, x], -1), train
        )


class Hallucination(nn.Module):
    """conv3x3 relu bn conv3x3(x), the last with bias: features of the other modality from those of this one."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w k"]:
        x = ConvNormReLU(self.channels, 3, dtype=self.dtype, name="hidden")(x, train)
        return conv(self.channels, 3, bias=True, init=kaiming_fan_in, dtype=self.dtype, name="project")(x)


class DHFASegmenter(PixelClassifier):
    """Laterals, top-down alignment, and one head on all levels; the levels are the encoder's strides.

        l_i = relu bn conv1x1(F_i);   P_n = PyramidPooling(F_n), the coarsest
        P_i = l_i + align(P_{i+1}, l_i),   O_i = relu bn conv3x3(P_i)      for i = n-1 .. 1
        U = relu bn conv3x3[O_1, up O_2, .., up P_n];   logits = up(conv1x1(U))

    Four levels at output stride 32; dilated stages share a stride, the last one's features count, and there is one
    level less for each. With `fuse` O_i reads [P_i, E_i], E_i = `Hallucination`(P_i), and U reads [P_n, E_n].
    `pyramid` of the prediction are the P_i, with `fuse` the E_i; `embedding` is U.
    channels: of all of them. align: `FlowAlignment`, or bilinear upsampling to the same grid. The rest as in
    `sarjax.options.DHFA`.
    """

    channels: int
    bins: tuple[int, ...]
    alignment: str
    corner_aligned: bool
    fuse: bool
    num_classes: int
    dtype: Any = jnp.float32

    def setup(self):
        def block(kernel: int) -> ConvNormReLU:
            return ConvNormReLU(self.channels, kernel, dtype=self.dtype)

        levels = len(set(self.encoder.strides.values()))
        self.laterals = [block(1) for _ in range(levels - 1)]
        self.pooling = PyramidPooling(self.bins, self.channels, dtype=self.dtype)
        if self.alignment == "flow":
            self.align = [
                FlowAlignment(max(1, self.channels // 2), self.corner_aligned, dtype=self.dtype)
                for _ in range(levels - 1)
            ]
        if self.fuse:
            self.hallucinate = [Hallucination(self.channels, dtype=self.dtype) for _ in range(levels)]
        self.smooth = [block(3) for _ in range(levels - 1)]
        self.join = block(3)
        self.classifier = conv(self.num_classes, bias=True, init=kaiming_fan_in, dtype=self.dtype)

    @property
    def context(self) -> FieldOfView:
        """Global: the pyramid pooling reads the whole image, and offsets have no bound."""
        return whole_image(self.encoder)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        return self.decode(self.encode(x, train), x.shape[1:3], train)

    def decode(self, features: dict[int, Array], size: tuple[int, int], train: bool) -> Prediction:
        """What the encoder's `features` of an image of `size` = (h, w) become."""
        pyramid = self._pyramid(features, train)
        distilled, outputs = pyramid, pyramid
        if self.fuse:
            distilled = {s: g(p, train) for (s, p), g in zip(pyramid.items(), self.hallucinate, strict=True)}
            outputs = {s: jnp.concatenate([p, distilled[s]], -1) for s, p in pyramid.items()}
        *finer, last = outputs.values()
        maps = [smooth(p, train) for smooth, p in zip(self.smooth, finer, strict=True)] + [last]
        finest = maps[0].shape[1:3]
        joined = jnp.concatenate([maps[0], *(resize_bilinear(y, finest) for y in maps[1:])], -1)
        embedding = self.join(joined, train)
        return Prediction(self.classify(embedding, size), None, features, distilled, embedding)

    def _pyramid(self, features: dict[int, Array], train: bool) -> dict[int, Array]:
        """{stride: P_i}, fine to coarse."""
        *finer, last = sorted(features)
        pyramid = {last: self.pooling(features[last], train)}
        coarse = pyramid[last]
        for i in reversed(range(len(finer))):
            lateral = self.laterals[i](features[finer[i]], train)
            if self.alignment == "flow":
                coarse = lateral + self.align[i](coarse, lateral)
            else:
                coarse = lateral + resize_bilinear(coarse, lateral.shape[1:3], align_corners=self.corner_aligned)
            pyramid[finer[i]] = coarse
        return {stride: pyramid[stride] for stride in sorted(pyramid)}


def build_dhfa(options: DHFA, num_classes: int, dtype: Any) -> DHFASegmenter:
    if not options.bins or min(options.bins) < 1:
        raise UserError(f"bins are {list(options.bins)}, but should be one or more whole numbers from 1.")
    if options.channels < 1:
        raise UserError(f"channels is {options.channels}, but should be a whole number from 1.")
    return DHFASegmenter(
        encoder=build_encoder(options, 4, dtype),
        channels=scaled(options.channels, options.width),
        bins=tuple(options.bins),
        alignment=options.alignment,
        corner_aligned=options.corner_aligned,
        fuse=options.fuse,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
    )
