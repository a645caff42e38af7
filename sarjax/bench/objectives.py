"""The objectives of sarjax's methods as good PyTorch has them, on networks of `sarjax.bench.peers`.

An objective is a function of tensors: images as the network sees them (b, c, h, w), labels (b, h, w) with 255 = ignore,
all pixels with data. What is random (augmentation, masks, withheld sensors) is left out: a benchmark turns it off.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarjax.bench.peers import DHFAPeer, DLLRPeer, resized
from sarjax.errors import UserError, unknown
from sarjax.losses.transport import DEAREST, FLOOR
from sarjax.options import Distillation, LabelReassignment, MethodOptions, Supervised
from sarjax.spec import IGNORE_LABEL

HEADS = ("fused", "optical", "sar")
Objective = Callable[[Mapping[str, Tensor]], Tensor]


def objective(options: MethodOptions, network: nn.Module, classes: int, teacher: nn.Module | None = None) -> Objective:
    """The loss of a batch {"image", "label", "teacher_image", "unlabelled"}, of which each method takes its own.

    Raises:
      UserError: a method that has no peer, or options that it does not know.
    """
    if type(options) is Supervised:
        return lambda batch: supervised(options, network(batch["image"]).float(), batch["label"])
    if type(options) is Distillation:
        _refuse(options, pairs=0, hard=0.0, confidence=0.0, right=False, reading="direct", logit_loss="pixel")
        if options.feature_loss != "normalised" or options.clustering.instance or options.clustering.cluster:
            raise UserError("the PyTorch peer of method 'dhfa' has normalised features and no clustering alone.")
        return lambda batch: distillation(options, network, teacher, batch)
    if type(options) is LabelReassignment:
        _refuse(options, unlabelled=1, cell=0, dropout=0.0, ramp=0.0, region=False, mass="soft", cost="log")
        return Reassignment(options, network, classes)
    raise unknown("method that has a PyTorch peer", options.NAME, ("supervised", "dhfa", "dllr"))


def _refuse(options: Any, **known: Any) -> None:
    for name, value in known.items():
        if getattr(options, name) != value:
            raise UserError(
                f"the PyTorch peer of method {options.NAME!r} has no method.{name} {getattr(options, name)!r}; "
                f"{value!r} is accepted."
            )


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, ignore_index=IGNORE_LABEL)


def dice(logits: Tensor, label: Tensor, smooth: float = 1e-6) -> Tensor:
    """`sarjax.losses.pixel.dice_loss`, divided."""
    valid = (label != IGNORE_LABEL)[:, None]
    one_hot = F.one_hot(torch.where(valid[:, 0], label, 0), logits.shape[1]).permute(0, 3, 1, 2) * valid
    p = logits.softmax(1) * valid
    hit, mass, count = (p * one_hot).sum((0, 2, 3)), p.sum((0, 2, 3)), one_hot.sum((0, 2, 3))
    there = count > 0
    return ((1 - (2 * hit + smooth) / (mass + count + smooth)) * there).sum() / there.sum()


def supervised(options: Supervised, logits: Tensor, label: Tensor) -> Tensor:
    if options.auxiliary or options.label_smoothing or options.class_weights != "none":
        raise UserError(
            "the PyTorch peer of supervised learning has neither method.auxiliary nor label_smoothing nor "
            "class_weights; 0, 0 and 'none' are accepted."
        )
    loss = cross_entropy(logits, label)
    return loss + options.dice * dice(logits, label) if options.dice else loss


def distillation(
    options: Distillation, network: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Tensor]
) -> Tensor:
    """`sarjax.methods.dhfa` with networks of one pyramid and as many channels."""
    if not (isinstance(network, DHFAPeer) and isinstance(teacher, DHFAPeer)):
        raise UserError("the PyTorch peer of method 'dhfa' teaches network 'dhfa' by another of its kind alone.")
    label = batch["label"]
    with torch.no_grad():
        taught, theirs, known = teacher.predict(batch["teacher_image"])
    logits, levels, embedding = network.predict(batch["image"])
    loss = supervised(options, logits, label)
    if options.features:
        pairs = [*((levels[s], theirs[s]) for s in levels), (embedding, known)]
        parts = [2 - 2 * F.cosine_similarity(ours.float(), other.float()).mean() for ours, other in pairs]
        loss = loss + options.features * sum(parts) / len(parts)
    if options.head:
        loss = loss + options.head * cross_entropy(teacher.classify(embedding, label.shape[1:]), label)
    if options.logits:
        t = options.temperature
        divergence = F.kl_div(
            (logits / t).log_softmax(1), (taught.float() / t).log_softmax(1), reduction="none", log_target=True
        )
        loss = loss + options.logits * t**2 * divergence.sum(1).mean()
    return loss


class Reassignment:
    """`sarjax.methods.dllr`, with what it remembers over batches, from its first batch on."""

    def __init__(self, options: LabelReassignment, network: DLLRPeer, classes: int):
        self.options, self.network, self.classes = options, network, classes
        self.frequencies: Tensor | None = None
        self.prototypes: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.queue: dict[str, list[Tensor]] = {head: [] for head in HEADS}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        options, label = self.options, batch["label"]
        n, size = len(label), label.shape[1:]
        found, features = self.network.views(torch.cat([batch["image"], batch["unlabelled"]]))
        loss = sum(supervised(options, resized(found[head][:n], size), label) for head in HEADS)
        theirs = {head: x[n:] for head, x in found.items()}
        if options.complementary:
            parts = [complementary(theirs[m], theirs[other]) for m, other in (("optical", "sar"), ("sar", "optical"))]
            loss = loss + 0.5 * options.complementary * sum(parts)
        if not (options.cross or options.consistency):
            return loss
        with torch.no_grad():
            clean, seen = self.network.views(batch["unlabelled"])
            self._remember({head: x[:n].detach() for head, x in features.items()}, label, clean)
            pseudo = {head: self._pseudo(head, clean[head], seen[head], size) for head in HEADS}
        logits = {head: resized(x, size) for head, x in theirs.items()}

        def by(head: str, teacher: str) -> Tensor:
            answer, weight = pseudo[teacher]
            return (F.cross_entropy(logits[head], answer, reduction="none") * weight).mean()

        if options.cross:
            loss = loss + options.cross * (by("optical", "sar") + by("sar", "optical"))
        if options.consistency:
            shares = {"fused": 1.0, "optical": 0.5, "sar": 0.5}
            loss = loss + options.consistency * sum(share * by(head, "fused") for head, share in shares.items())
        return loss

    def _remember(self, features: Mapping[str, Tensor], label: Tensor, clean: Mapping[str, Tensor]) -> None:
        kept = self.options.momentum
        one_hot = (label[:, None] == torch.arange(self.classes, device=label.device)[:, None, None]).float()
        counts = one_hot.sum((0, 2, 3))
        share = counts / counts.sum()
        self.frequencies = share if self.frequencies is None else kept * self.frequencies + share
        for head, x in features.items():
            cells = F.adaptive_avg_pool2d(one_hot, x.shape[2:])
            count = cells.sum((0, 2, 3))
            mean = torch.einsum("bkhw,bdhw->kd", cells, F.normalize(x.float())) / count.clamp_min(1e-12)[:, None]
            if head in self.prototypes:
                old, known = self.prototypes[head], self.seen[head][:, None] > 0
                mean = torch.where(count[:, None] > 0, torch.where(known, kept * old + (1 - kept) * mean, mean), old)
            self.prototypes[head] = mean
            self.seen[head] = torch.maximum(self.seen.get(head, torch.zeros_like(count)), (count > 0).float())
            # The mean prediction of every batch, of the last ones.
            self.queue[head] = [*self.queue[head], clean[head].softmax(1).mean((0, 2, 3))][-self.options.queue :]

    def _pseudo(self, head: str, logits: Tensor, features: Tensor, size: Any) -> tuple[Tensor, Tensor]:
        """(label, weight) at `size`."""
        options = self.options
        predicted = torch.stack(self.queue[head]).sum(0)
        asked = self.frequencies / self.frequencies.sum() + predicted / predicted.sum()
        asked = (asked / asked.sum()).clamp_min(FLOOR)
        levels = []
        for cost, epsilon in self._costs(head, logits, features):
            plan = transport(cost, asked / asked.sum(), epsilon, options.relaxation, options.iterations)
            shares = (plan / plan.sum(1, keepdim=True)).reshape(len(logits), *logits.shape[2:], -1)
            levels.append(resized(shares.permute(0, 3, 1, 2), size))
        weight, label = resized(logits, size).softmax(1).max(1)
        if levels:
            label = sum(levels).argmax(1)
            for level in levels:
                weight = torch.where(level.argmax(1) == label, weight, 0.0)
        return label, torch.where(weight >= options.threshold, weight, 0.0)

    def _costs(self, head: str, logits: Tensor, features: Tensor) -> Iterator[tuple[Tensor, float]]:
        """(cost (n, k), epsilon) of each level."""
        options = self.options
        if options.prediction:
            p = logits.softmax(1).permute(0, 2, 3, 1).flatten(0, 2)
            yield (-p.clamp_min(1e-30).log()).clamp_max(DEAREST), options.epsilon
        if options.prototype:
            rows = F.normalize(features.float().permute(0, 2, 3, 1).flatten(0, 2), dim=1)
            known = self.seen[head] > 0
            cost = torch.where(known, 0.5 * (1 - rows @ F.normalize(self.prototypes[head], dim=1).T), 1.0)
            yield cost / cost[:, known].mean(), options.prototype_epsilon


def complementary(logits: Tensor, others: Tensor) -> Tensor:
    """`sarjax.methods.dllr_terms.complementary_loss`, divided."""
    log_p, log_q = logits.log_softmax(1), others.detach().log_softmax(1)
    q = log_q.exp()
    distance = 0.5 * (log_p.detach().exp() - q).abs().sum(1)
    return (distance * (q * (log_q - log_p)).sum(1)).sum() / distance.sum()


def transport(cost: Tensor, asked: Tensor, epsilon: float, relaxation: float, iterations: int) -> Tensor:
    """The plan (n, k) from pixels of equal mass, exactly, to `asked`, relaxed: Sinkhorn in the log domain."""
    log_a, log_b, kernel = -math.log(len(cost)), asked.log(), -cost / epsilon
    f, g = cost.new_zeros(len(cost)), torch.zeros_like(asked)
    for _ in range(iterations):
        g = relaxation * (log_b - (kernel + f[:, None]).logsumexp(0))
        f = log_a - (kernel + g).logsumexp(1)
    return (kernel + f[:, None] + g).exp()
