"""DLLR's network (Han et al.): an encoder-decoder per sensor, and an exchange between them guided by their difference.

The source states the idea of difference-guided complementary learning; layers are our design.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.models.context import FieldOfView
from sarjax.models.dhfa import DHFASegmenter, build_dhfa
from sarjax.models.layers import ConvNormReLU, Sigmoid, conv, kaiming_fan_in
from sarjax.models.segmenters import Prediction, resized
from sarjax.options import DHFA, DLLR

SENSORS = ("optical", "sar")
FUSED = "fused"


class Views(NamedTuple):
    """What each head sees: {"fused" | "optical" | "sar": (b, h', w', _)}; logits are float32, at the embedding's size.

    features: {stride: both encoders' features, those of SENSORS in order, on channels}.
    """

    logits: dict[str, Float[Array, "b _ _ k"]]
    embeddings: dict[str, Float[Array, "b _ _ c"]]
    features: dict[int, Float[Array, "b _ _ _"]]


class DLLRSegmenter(nn.Module):
    """F_m = decoder of sensor m, p_m its own head, before the exchange, so that the two stay independent.

        D = |phi_o F_o - phi_s F_s|;   G_m = sigmoid(conv3x3[D, F_m]);   F^_m = F_m + G_m psi_m(F_m')
        U = relu bn conv3x3[F^_o, F^_s];   p_f = conv1x1(U)

    A sensor that is not there: F_m = 0, and the other takes nothing from it (G_m' = 0).
    phi, psi: 1x1 convolutions without bias. Prediction: logits and embedding U of the fused head; pyramid: `features`.
    groups: the channels of the input that are optical's and SAR's; () = both see all of them.
    """

    optical: DHFASegmenter
    sar: DHFASegmenter
    num_classes: int
    groups: tuple[tuple[int, ...], ...] = ()
    dtype: Any = jnp.float32
    classifies: ClassVar[bool] = True

    def setup(self):
        channels = self.optical.channels

        def plain(n: int, kernel: int = 1, bias: bool = False) -> nn.Conv:
            return conv(n, kernel, bias=bias, init=kaiming_fan_in, dtype=self.dtype)

        self.difference = {m: plain(channels) for m in SENSORS}
        self.gate = {m: plain(channels, 3, bias=True) for m in SENSORS}
        self.gated = {m: Sigmoid() for m in SENSORS}
        self.taken = {m: plain(channels) for m in SENSORS}
        self.join = ConvNormReLU(channels, 3, dtype=self.dtype)
        self.classifier = plain(self.num_classes, bias=True)

    @property
    def context(self) -> FieldOfView:
        """Global, as both decoders are."""
        return self.optical.context

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Prediction:
        views = self.views(x, train)
        logits = resized(views.logits[FUSED], x.shape[1:3])
        return Prediction(logits, None, views.features, views.features, views.embeddings[FUSED])

    def encode(self, x: Float[Array, "b h w c"], train: bool) -> dict[int, Float[Array, "b _ _ _"]]:
        return _joined([getattr(self, m).encode(y, train) for m, y in self._parts(x).items()])

    def classify(self, embedding: Float[Array, "b _ _ c"], size: tuple[int, int]) -> Float[Array, "b h w k"]:
        """The fused head's logits at `size` of an embedding."""
        return resized(self.classifier(embedding), size)

    def views(
        self,
        x: Float[Array, "b h w c"],
        train: bool,
        present: dict[str, Float[Array, " b"]] | None = None,
    ) -> Views:
        """All heads. present: 1 or 0 for every sensor and row, whether the fused head may use it; None = always."""
        found = {m: getattr(self, m)(y, train) for m, y in self._parts(x).items()}
        embeddings = {m: p.embedding for m, p in found.items()}
        there = {m: 1.0 if present is None else present[m][:, None, None, None].astype(self.dtype) for m in SENSORS}
        f = {m: embeddings[m] * there[m] for m in SENSORS}
        optical, sar = (self.difference[m](f[m]) for m in SENSORS)
        d = jnp.abs(optical - sar)
        exchanged = []
        for m, other in zip(SENSORS, reversed(SENSORS), strict=True):
            gate = self.gated[m](self.gate[m](jnp.concatenate([d, f[m]], -1))) * there[other]
            exchanged.append(f[m] + gate * self.taken[m](f[other]))
        embeddings[FUSED] = self.join(jnp.concatenate(exchanged, -1), train)
        scores = {m: getattr(self, m).classifier(embeddings[m]) for m in SENSORS}
        scores[FUSED] = self.classifier(embeddings[FUSED])
        logits = {name: y.astype(jnp.float32) for name, y in scores.items()}
        return Views(logits, embeddings, _joined([p.features for p in found.values()]))

    def _parts(self, x: Float[Array, "b h w c"]) -> dict[str, Float[Array, "b h w _"]]:
        if not self.groups:
            return dict.fromkeys(SENSORS, x)
        return {m: jnp.stack([x[..., c] for c in group], -1) for m, group in zip(SENSORS, self.groups, strict=True)}


def _joined(features: list[dict[int, Array]]) -> dict[int, Array]:
    return {stride: jnp.concatenate([f[stride] for f in features], -1) for stride in features[0]}


def build_dllr(options: DLLR, num_classes: int, dtype: Any) -> DLLRSegmenter:
    decoder = DHFA(
        options.encoder,
        options.width,
        options.output_stride,
        channels=options.channels,
        bins=options.bins,
        alignment=options.alignment,
    )
    optical, sar = (build_dhfa(decoder, num_classes, dtype) for _ in SENSORS)
    return DLLRSegmenter(optical, sar, num_classes, dtype=jnp.dtype(dtype))
