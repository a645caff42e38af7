"""The networks of sarjax as good PyTorch has them: what a benchmark puts beside ours.

Submodules are called as ours, so that `load` copies our variables and both compute the same function; the tests hold
them to it. Tensors are (b, c, h, w), best in the memory format channels_last. Imported only where torch is installed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarjax.errors import UserError, unknown
from sarjax.models.lanet import EMBEDDING_WINDOW, MOMENTUM
from sarjax.models.layers import scaled
from sarjax.models.resnet import ENCODERS, EXPANSION, channels_of
from sarjax.options import DHFA, DLLR, DeepLabV3, LANet, NetworkOptions

SENSORS = ("optical", "sar")


def peer(options: NetworkOptions, channels: int, classes: int, groups: Sequence[Sequence[int]] = ()) -> nn.Module:
    """The PyTorch network of `options` for images of `channels`, in training mode.

    `forward(x)` gives logits (b, classes, h, w) at the size of x; see the classes for what else there is.
    groups: of DLLR, the channels that are optical's and SAR's.

    Raises:
      UserError: a network that has no peer, or options that the peer does not know.
    """
    if isinstance(options, LANet):
        return LANetPeer(options, channels, classes)
    if isinstance(options, DeepLabV3):
        return DeepLabPeer(options, channels, classes)
    if isinstance(options, DHFA):
        return DHFAPeer(options, channels, classes)
    if isinstance(options, DLLR):
        return DLLRPeer(options, groups or [range(channels)] * 2, classes)
    raise unknown("network that has a PyTorch peer", options.NAME, ("lanet", "deeplabv3", "dhfa", "dllr"))


def load(module: nn.Module, params: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
    """Copies our parameters and running statistics into a peer; ValueError where a tensor of the peer is left over."""
    left = dict(module.state_dict(keep_vars=True))
    names = {"scale": "weight", "mean": "running_mean", "var": "running_var"}

    def copy(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping):
                copy(leaf, (*path, name))
                continue
            value = np.asarray(leaf, np.float32)
            if name == "kernel":
                name, value = "weight", value.transpose(3, 2, 0, 1)
            tensor = left.pop(".".join((*path, names.get(name, name))))
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(np.array(value)))  # a copy: what jax holds is read-only

    copy(params, ())
    copy(stats, ())
    if left := [name for name in left if not name.endswith("num_batches_tracked")]:
        raise ValueError(f"the peer has {', '.join(left)}, which our variables do not")


# --- Layers


def conv(inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, dilation: int = 1, bias: bool = False):
    pad = dilation * (kernel - 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, pad, dilation, bias=bias)


class ConvNormReLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1):
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, kernel, dilation=dilation), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:  # PyTorch refuses what we define
            raise UserError("the PyTorch peer has no batch-norm of a single value; a batch of two or more is accepted.")
        return F.relu(self.bn(self.conv(x)), inplace=True)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Block(nn.Module):
    """A basic block or a bottleneck of a ResNet."""

    def __init__(self, inputs: int, channels: int, stride: int, dilation: int, bottleneck: bool):
        super().__init__()
        outputs = channels * (EXPANSION if bottleneck else 1)
        spatial = {"kernel": 3, "stride": stride, "dilation": dilation}
        if bottleneck:
            convs = [conv(inputs, channels), conv(channels, channels, **spatial), conv(channels, outputs)]
        else:
            convs = [conv(inputs, channels, **spatial), conv(channels, channels, 3, dilation=dilation)]
        self.depth = len(convs)
        for i, one in enumerate(convs, 1):
            setattr(self, f"conv{i}", one)
            setattr(self, f"bn{i}", nn.BatchNorm2d(one.out_channels))
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.downsample_0, self.downsample_1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y, inplace=True) if i < self.depth else y
        return F.relu(y + (self.downsample_1(self.downsample_0(x)) if self.projects else x), inplace=True)


class Encoder(nn.Module):
    """`sarjax.models.resnet.ResNet`: {stride: features}, of stages with one stride the last."""

    def __init__(self, options: NetworkOptions, channels: int, stages: int):
        super().__init__()
        bottleneck, blocks = ENCODERS[options.encoder]
        first = scaled(64, options.width)
        self.conv1, self.bn1 = conv(channels, first, 7, stride=2), nn.BatchNorm2d(first)
        self.stages: list[tuple[int, list[str]]] = []
        inputs, reached, dilation = first, 4, 1
        for stage in range(1, stages + 1):
            stride, before = (1 if stage == 1 else 2), dilation
            if reached * stride > options.output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            names = [f"layer{stage}_{i}" for i in range(blocks[stage - 1])]
            for i, name in enumerate(names):
                how = (stride, before) if i == 0 else (1, dilation)
                setattr(self, name, Block(inputs, scaled(64 * 2 ** (stage - 1), options.width), *how, bottleneck))
                inputs = channels_of(options.encoder, options.width, stage)
            self.stages.append((reached, names))

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        found = {}
        for stride, names in self.stages:
            for name in names:
                x = getattr(self, name)(x)
            found[stride] = x
        return found


# --- LANet and DeepLabv3


class Attention(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.down, self.up = conv(inputs, hidden, bias=True), conv(hidden, outputs, bias=True)
        self.bn = nn.BatchNorm2d(hidden, momentum=1 - MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.up(F.relu(self.bn(self.down(x)), inplace=True)))


class PatchAttention(nn.Module):
    def __init__(self, channels: int, window: int, reduction: int):
        super().__init__()
        self.window, self.attention = window, Attention(channels, max(1, channels // reduction), channels)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        grid = [max(n // self.window, 1) for n in size] if self.window else (1, 1)
        return x + x * resized(self.attention(F.adaptive_avg_pool2d(x, grid)), size)


class Embedding(nn.Module):
    def __init__(self, high: int, low: int, reduction: int, residual: bool):
        super().__init__()
        self.residual, self.attention = residual, Attention(high, max(1, high // reduction), low)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        means = F.avg_pool2d(high, EMBEDDING_WINDOW + 1, 1, EMBEDDING_WINDOW // 2)
        attended = low * resized(self.attention(means), low.shape[2:])
        return low + attended if self.residual else attended


class LANetPeer(nn.Module):
    """`sarjax.models.lanet.LANetSegmenter`."""

    def __init__(self, o: LANet, channels: int, classes: int):
        super().__init__()
        high, low = scaled(o.channels, o.width), scaled(64, o.width)
        last, first = (channels_of(o.encoder, o.width, stage) for stage in (o.stages, 1))
        self.encoder = Encoder(o, channels, o.stages)
        self.first = self.encoder.stages[0][0]
        self.high_conv, self.high_bn = conv(last, high), nn.BatchNorm2d(high, momentum=1 - MOMENTUM)
        self.low_conv, self.low_bn = conv(first, low, bias=True), nn.BatchNorm2d(low, momentum=1 - MOMENTUM)
        self.high_attention = PatchAttention(high, o.high_window, o.high_reduction)
        self.low_attention = PatchAttention(low, o.low_window, o.low_reduction)
        self.embedding = Embedding(high, low, o.high_reduction, o.residual)
        self.low_classifier, self.high_classifier = conv(low, classes, bias=True), conv(high, classes, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        features, size = self.encoder(x), x.shape[2:]
        high = F.relu(self.high_bn(self.high_conv(features[max(features)])), inplace=True)
        high = self.high_attention(high)
        low = F.relu(self.low_bn(self.low_conv(features[self.first])), inplace=True)
        low = self.embedding(high.detach(), self.low_attention(low))
        return resized(self.low_classifier(low), size) + resized(self.high_classifier(high), size)


class ASPP(nn.Module):
    def __init__(self, inputs: int, channels: int, rates: Sequence[int]):
        super().__init__()
        self.point, self.image = ConvNormReLU(inputs, channels), ConvNormReLU(inputs, channels)
        self.rates = [f"rate_{i}" for i in range(len(rates))]
        for name, rate in zip(self.rates, rates, strict=True):
            setattr(self, name, ConvNormReLU(inputs, channels, 3, rate))
        self.project = ConvNormReLU((len(rates) + 2) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.point(x), *(getattr(self, name)(x) for name in self.rates)]
        parts.append(self.image(F.adaptive_avg_pool2d(x, 1)).expand_as(parts[0]))
        return self.project(torch.cat(parts, 1))


class DeepLabPeer(nn.Module):
    """`sarjax.models.deeplab.DeepLabV3Segmenter`."""

    def __init__(self, o: DeepLabV3, channels: int, classes: int):
        super().__init__()
        width = scaled(o.channels, o.width)
        self.encoder = Encoder(o, channels, 4)
        self.aspp = ASPP(channels_of(o.encoder, o.width, 4), width, o.rates)
        self.classifier = conv(width, classes, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        return resized(self.classifier(self.aspp(features[max(features)])), x.shape[2:])


# --- DHFA-Net and DLLR


class FlowAlignment(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.high, self.low = conv(inputs, hidden), conv(inputs, hidden)
        self.offsets = conv(2 * hidden, 2, 3)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        (ch, cw), (h, w) = coarse.shape[2:], fine.shape[2:]
        offsets = self.offsets(torch.cat([resized(self.high(coarse), (h, w)), self.low(fine)], 1)).float()
        # Half-pixel places in -1..1 over the outer edges, moved by offsets in cells of `coarse`.
        x = (2 * torch.arange(w, device=coarse.device) + 1) / w - 1 + offsets[:, 0] * (2 / cw)
        y = ((2 * torch.arange(h, device=coarse.device) + 1) / h - 1)[:, None] + offsets[:, 1] * (2 / ch)
        grid = torch.stack([x, y], -1)
        return F.grid_sample(coarse.float(), grid, padding_mode="border", align_corners=False).to(coarse.dtype)


class PyramidPooling(nn.Module):
    def __init__(self, inputs: int, channels: int, bins: Sequence[int]):
        super().__init__()
        self.bins, level = tuple(bins), max(1, channels // 4)
        for i in range(len(self.bins)):
            setattr(self, f"level_{i}", conv(inputs, level, bias=True))
        self.project = ConvNormReLU(inputs + level * len(self.bins), channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for i, side in enumerate(self.bins):
            means = F.adaptive_avg_pool2d(x, side)
            levels.append(resized(F.relu(getattr(self, f"level_{i}")(means), inplace=True), x.shape[2:]))
        return self.project(torch.cat([*levels, x], 1))


class DHFAPeer(nn.Module):
    """`sarjax.models.dhfa.DHFASegmenter`, without `fuse` and `corner_aligned`.

    `predict(x)` gives (logits, {stride: P_i}, embedding), `classify(embedding, size)` the classifier alone.
    """

    def __init__(self, o: DHFA, channels: int, classes: int):
        super().__init__()
        if o.fuse or o.corner_aligned:
            raise UserError("the PyTorch peer of network 'dhfa' has neither fuse nor corner_aligned; both false fit.")
        width = scaled(o.channels, o.width)
        self.encoder = Encoder(o, channels, 4)
        strides = {stride: stage for stage, (stride, _) in enumerate(self.encoder.stages, 1)}
        *finer, last = [channels_of(o.encoder, o.width, stage) for stage in strides.values()]
        self.levels, self.flow = len(finer), o.alignment == "flow"
        self.pooling = PyramidPooling(last, width, o.bins)
        for i, inputs in enumerate(finer):
            setattr(self, f"laterals_{i}", ConvNormReLU(inputs, width))
            setattr(self, f"smooth_{i}", ConvNormReLU(width, width, 3))
            if self.flow:
                setattr(self, f"align_{i}", FlowAlignment(width, max(1, width // 2)))
        self.join = ConvNormReLU((self.levels + 1) * width, width, 3)
        self.classifier = conv(width, classes, bias=True)

    def predict(self, x: Tensor) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        features = self.encoder(x)
        *finer, last = sorted(features)
        pyramid = {last: self.pooling(features[last])}
        coarse = pyramid[last]
        for i in reversed(range(self.levels)):
            lateral = getattr(self, f"laterals_{i}")(features[finer[i]])
            up = getattr(self, f"align_{i}")(coarse, lateral) if self.flow else resized(coarse, lateral.shape[2:])
            coarse = pyramid[finer[i]] = lateral + up
        maps = [getattr(self, f"smooth_{i}")(pyramid[stride]) for i, stride in enumerate(finer)] + [pyramid[last]]
        finest = maps[0].shape[2:]
        embedding = self.join(torch.cat([maps[0], *(resized(y, finest) for y in maps[1:])], 1))
        return self.classify(embedding, x.shape[2:]), {s: pyramid[s] for s in sorted(pyramid)}, embedding

    def classify(self, embedding: Tensor, size: Sequence[int]) -> Tensor:
        return resized(self.classifier(embedding).float(), size)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)[0]


class DLLRPeer(nn.Module):
    """`sarjax.models.dllr.DLLRSegmenter`; groups: the channels that are optical's and SAR's.

    `views(x, present)` gives ({head: logits at the embedding's size}, {head: embedding}).
    """

    def __init__(self, o: DLLR, groups: Sequence[Sequence[int]], classes: int):
        super().__init__()
        self.groups = dict(zip(SENSORS, map(list, groups), strict=True))
        width = scaled(o.channels, o.width)
        decoder = DHFA(o.encoder, o.width, o.output_stride, channels=o.channels, bins=o.bins, alignment=o.alignment)
        for m, group in self.groups.items():
            setattr(self, m, DHFAPeer(decoder, len(group), classes))
            setattr(self, f"difference_{m}", conv(width, width))
            setattr(self, f"gate_{m}", conv(2 * width, width, 3, bias=True))
            setattr(self, f"taken_{m}", conv(width, width))
        self.join, self.classifier = ConvNormReLU(2 * width, width, 3), conv(width, classes, bias=True)

    def views(
        self, x: Tensor, present: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = {m: getattr(self, m).predict(x[:, group])[2] for m, group in self.groups.items()}
        rows = x.new_ones(len(x))
        there = {m: (rows if present is None else present[m])[:, None, None, None] for m in SENSORS}
        f = {m: (found[m] * there[m]).to(found[m].dtype) for m in SENSORS}
        optical, sar = (getattr(self, f"difference_{m}")(f[m]) for m in SENSORS)
        d, exchanged = (optical - sar).abs(), []
        for m, other in zip(SENSORS, reversed(SENSORS), strict=True):
            gate = torch.sigmoid(getattr(self, f"gate_{m}")(torch.cat([d, f[m]], 1))) * there[other]
            exchanged.append(f[m] + gate.to(d.dtype) * getattr(self, f"taken_{m}")(f[other]))
        found["fused"] = self.join(torch.cat(exchanged, 1))
        logits = {m: getattr(self, m).classifier(found[m]).float() for m in SENSORS}
        return {**logits, "fused": self.classifier(found["fused"]).float()}, found

    def forward(self, x: Tensor) -> Tensor:
        return resized(self.views(x)[0]["fused"], x.shape[2:])
