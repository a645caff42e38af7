"""A training step in good PyTorch: channels_last, fused optimizer, autocast for bfloat16, plain or compiled."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sarjax.bench.objectives import objective
from sarjax.bench.peers import load, peer
from sarjax.config import Experiment
from sarjax.errors import UserError
from sarjax.machine import visible_cores


class TorchStep:
    """The step of `sarjax.bench.step.Ours`, from what its `peer_arguments` hold. On a GPU where torch sees one."""

    def __init__(self, experiment: Experiment, arguments: Mapping[str, Any], *, compiled: bool):
        torch.set_num_threads(visible_cores())
        torch.set_float32_matmul_precision("highest")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bfloat16 = experiment.precision == "bfloat16"
        network = peer(experiment.network, arguments["channels"], arguments["classes"], arguments["groups"])
        load(network, *arguments["weights"])
        self.network = self._placed(network).train()
        teacher = None
        if "teacher" in arguments:
            options, channels, weights = arguments["teacher"]
            teacher = peer(options, channels, arguments["classes"])
            load(teacher, *weights)
            teacher = self._placed(teacher).eval().requires_grad_(False)
        self.loss = objective(experiment.method, self.network, arguments["classes"], teacher)
        self.batch = {name: self._tensor(value) for name, value in arguments["batch"].items()}
        self.optimizer = optimizer(experiment, self.network, arguments["rate"])
        if compiled:
            self.loss = torch.compile(self.loss)

    def _placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, memory_format=torch.channels_last)

    def _tensor(self, value: np.ndarray) -> Tensor:
        if value.ndim == 4:
            images = torch.from_numpy(np.array(value.transpose(0, 3, 1, 2)))
            return images.to(self.device, memory_format=torch.channels_last)
        return torch.from_numpy(value.astype(np.int64)).to(self.device)

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(self.batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()  # waits for a GPU


def optimizer(experiment: Experiment, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    """`sarjax.train.optimizer.make_optimizer` at a constant rate: decay on kernels alone."""
    o = experiment.optimizer
    if o.clip or o.ema:
        raise UserError("the PyTorch peer has neither optimizer.clip nor optimizer.ema; 0 is accepted for both.")
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if o.name == "sgd":
        return torch.optim.SGD(groups, rate, momentum=o.momentum, nesterov=o.nesterov, fused=True)
    return torch.optim.AdamW(groups, rate, fused=True)
