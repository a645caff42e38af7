"""What a network costs: parameters, memory and operations as the literature counts them, and as XLA compiles them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sarjax.errors import UserError
from sarjax.models import NETWORKS, build_network
from sarjax.models.layers import AdaptiveAvgPool, AvgPool, BatchNorm, MaxPool, PReLU, ReLU, Sigmoid
from sarjax.options import Change, LANet, NetworkOptions

Rule = Callable[[Any, Any, Any], int]


def _convolution(module: nn.Conv, x: Any, y: Any) -> int:
    macs = math.prod(module.kernel_size) * (x.shape[-1] // module.feature_group_count) * y.size
    return macs + (y.size if module.use_bias else 0)


def _transposed(module: nn.ConvTranspose, x: Any, y: Any) -> int:
    macs = math.prod(module.kernel_size) * module.features * x.size
    return macs + (y.size if module.use_bias else 0)


def _per_input(operations: int) -> Rule:
    return lambda module, x, y: operations * x.size


# Operations of the modules that are counted, as torchstat does: multiply-accumulates and bias additions of
# convolutions; two per element for a batch-norm; a linear layer's bias is free. A new leaf module is one line here.
LEAVES: dict[type[nn.Module], Rule] = {
    nn.Conv: _convolution,
    nn.ConvTranspose: _transposed,
    nn.Dense: lambda module, x, y: x.size * module.features,
    BatchNorm: _per_input(2),
    ReLU: _per_input(1),
    PReLU: _per_input(1),
    MaxPool: _per_input(1),
    AvgPool: _per_input(1),
    AdaptiveAvgPool: _per_input(0),
    Sigmoid: _per_input(0),
}

# Named configurations beside the defaults of every network.
VARIANTS: dict[str, NetworkOptions] = {
    "lanet_r18": LANet(encoder="resnet18", stages=3, low_window=8, high_window=2),  # Cheng et al., Table 2
    "fcn_se": LANet(encoder="resnet18", stages=3, low_window=0, high_window=0),  # Cheng et al., Table 1
    "change_r50": Change(encoder="resnet50"),
    "change_r34": Change(encoder="resnet34"),
    "change_r18_half": Change(width=0.5),
    "change_r18_quarter": Change(width=0.25),
}


class Count(NamedTuple):
    """parameters: number. memory_mb: sizes of the leaf modules' outputs as float32, in MiB. flops: operations."""

    parameters: int
    memory_mb: float
    flops: int


class Cost(NamedTuple):
    """A `Count`, and what XLA says of the compiled inference at batch 1 on the default device (None: not asked).

    xla_flops: operations, a multiply-accumulate counting 2. xla_peak_bytes: arguments, outputs and temporaries.
    """

    parameters: int
    memory_mb: float
    flops: int
    xla_flops: float | None
    xla_peak_bytes: int | None


class Call(NamedTuple):
    """A leaf module ran: its path in the network, its operations, and how many elements it returned."""

    path: tuple[str, ...]
    flops: int
    elements: int


Reading = Callable[[list[Call]], list[Call]]


def count(network: nn.Module, size: int, in_channels: int, reading: Reading = list) -> Count:
    """Costs of one image (size, size, in_channels), by tracing alone, both dates where there are two.

    The published counting (torchstat's): the leaf modules that run (`LEAVES`) count, each with its last call; what a
    network calls as a function (resizing, additions, LANet's adaptive pools) is free.
    reading: what to count instead of the calls, in their order, where published code has other modules than ours.
    """
    variables, calls = _watched(lambda: _abstract_variables(network, size, in_channels))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    last = {call.path: call for call in reading(calls)}.values()
    return Count(parameters, 4 * sum(call.elements for call in last) / 2**20, sum(call.flops for call in last))


def count_flops(predict: Callable[..., Any], *args: Any) -> int:
    """Operations of `predict(*args)` by the counting of `count`, for whatever calls flax modules: a method's head.

    args: arrays or their shapes. For a head that runs its network once it is what `count` says of the network.
    """
    _, calls = _watched(lambda: jax.eval_shape(lambda *given: predict(*given), *args))
    return sum({call.path: call.flops for call in calls}.values())


def _watched(trace: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """What `trace` returns, and the leaf modules that ran in it, in order."""
    calls: list[Call] = []

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        rule = LEAVES.get(type(context.module))
        if rule is not None and context.method_name == "__call__":
            calls.append(Call(context.module.path, rule(context.module, args[0], y), y.size))
        return y

    with nn.intercept_methods(watch):
        return trace(), calls


@functools.cache
def cost(options: NetworkOptions, num_classes: int, in_channels: int, size: int, *, xla: bool = True) -> Cost:
    """Costs of the float32 network of `options` on one image (size, size, in_channels).

    xla: also compile it and ask XLA (seconds).
    """
    network = build_network(options, num_classes)
    counted = count(network, size, in_channels)
    if not xla:
        return Cost(*counted, None, None)
    compiled = (
        jax.jit(lambda variables, x: network.apply(variables, x, False).logits)
        .lower(_abstract_variables(network, size, in_channels), _image(size, in_channels))
        .compile()
    )
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Cost(*counted, float(compiled.cost_analysis()["flops"]), peak - memory.alias_size_in_bytes)


def model_table(size: int = 256, classes: int = 7, channels: int = 3, *, xla: bool = True) -> list[dict[str, Any]]:
    """A row per known network, at its default options, and per named variant: {"name", fields of `Cost`}.

    channels: of each date, for networks that compare dates.
    UserError for a size, a number of classes or of channels below 1.
    """
    for what, value in (("size", size), ("classes", classes), ("channels", channels)):
        if value < 1:
            raise UserError(f"{what} is {value}; a whole number from 1 is accepted.")
    known = {name: NetworkOptions.registry()[name]() for name in NETWORKS} | VARIANTS
    return [
        {"name": name, **cost(options, classes, channels * options.DATES, size, xla=xla)._asdict()}
        for name, options in known.items()
    ]


def _image(size: int, in_channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size, size, in_channels), jnp.float32)


def _abstract_variables(network: nn.Module, size: int, in_channels: int) -> Any:
    return jax.eval_shape(lambda x: network.init(jax.random.key(0), x, False), _image(size, in_channels))
