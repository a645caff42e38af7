"""Table 2 of Cheng et al.: the figures that it prints, beside what our networks count by the same rules."""

import itertools
from typing import Any, NamedTuple

from sarjax.models import build_network
from sarjax.models.cost import VARIANTS, Call, Count, Reading, count
from sarjax.options import DeepLabV3, NetworkOptions, PSPNet

SIZE, CHANNELS = 256, 3


class Figures(NamedTuple):
    """Parameters in millions, memory in MiB, operations in billions (the table's M, MB and G)."""

    parameters: float
    memory: float
    flops: float


class Row(NamedTuple):
    """A row of the table and the configuration that fits it best.

    system: as the table calls it. network: our name, as in `model_table`. classes: with which it fits; the paper does
    not say how many the table has. printed: the figures. reading: how published code differs from ours in modules
    that have no parameters (see `count`). remark: what the figures rest on. projectors: widths of the fully connected
    networks that training adds.
    """

    system: str
    network: str
    options: NetworkOptions
    classes: int
    printed: Figures
    reading: Reading
    remark: str
    projectors: tuple[tuple[int, ...], ...] = ()


def _own_relus(calls: list[Call]) -> list[Call]:
    """A ReLU of its own after each norm inside a block of the last stage, and a function after the addition.

    Ours has one per block, which counts with its last call, the largest.
    """
    found: list[Call] = []
    times: dict[tuple[str, ...], int] = {}
    for call in calls:
        *_, module, leaf = "", *call.path
        if module.startswith("layer4_") and leaf == "relu":
            times[call.path] = times.get(call.path, 0) + 1
            if times[call.path] <= 2:
                found.append(call._replace(path=(*call.path, str(times[call.path]))))
        else:
            found.append(call)
    return found


def _dropouts_and_log_softmax(calls: list[Call]) -> list[Call]:
    """One dropout after the pyramid, one that follows each upsampling and counts with the last, and a log-softmax."""
    last = {call.path: call for call in calls}
    upsampled = [call for path, call in last.items() if path[-1] == "prelu"][-1]
    after = {"dropout_1": last["pyramid", "relu"], "dropout_2": upsampled, "log_softmax": last["classifier",]}
    return [*calls, *(Call((name,), 0, call.elements) for name, call in after.items())]


def _projectors(widths: tuple[tuple[int, ...], ...]) -> Count:
    """Of fully connected networks with a ReLU between their layers, by the rules of `sarjax.models.cost.LEAVES`."""
    layers = [(m, n) for each in widths for m, n in itertools.pairwise(each)]
    relus = [n for each in widths for n in each[1:-1]]
    elements = sum(n for _, n in layers) + sum(relus)
    parameters = sum(m * n + n for m, n in layers)
    return Count(parameters, 4 * elements / 2**20, sum(m * n for m, n in layers) + sum(relus))


ROWS = (
    Row(
        "FCN+SE",
        "fcn_se",
        VARIANTS["fcn_se"],
        7,
        Figures(2.83, 35.87, 1.87),
        list,
        "LANet with one patch, the whole image (windows 0); 8 classes fit parameters and Flops as well. The printed "
        "memory is LANet's: patch means of 1x1 need less.",
    ),
    Row(
        "Deeplabv3",
        "deeplabv3",
        DeepLabV3(),
        8,
        Figures(39.05, 164.27, 11.99),
        _own_relus,
        "8 classes; 7 print 39.04 M. With one ReLU module per block, as we have it, the memory is 167.27 MB: the "
        "printed one fits two ReLU modules per block of the last stage and a function after its addition.",
    ),
    Row(
        "PSPNet",
        "pspnet",
        PSPNet(),
        8,
        Figures(53.38, 428.78, 50.51),
        _dropouts_and_log_softmax,
        "8 classes; 7 print 428.28 MB and 50.50 G. The memory includes 22 MB of two dropouts and a log-softmax, which "
        "ours leaves out. No configuration is known that fits the printed parameters as well.",
    ),
    Row(
        "LANet",
        "lanet_r18",
        VARIANTS["lanet_r18"],
        7,
        Figures(2.83, 35.87, 1.87),
        list,
        "7 classes and patches of 8 and 2 cells; 8 classes fit with patches of 10 and 2.",
    ),
    Row(
        "our method",
        "lanet_r18",
        VARIANTS["lanet_r18"],
        7,
        Figures(2.91, 35.87, 1.87),
        list,
        "LANet and the two projectors of its training, 256-128-128 and 256-128-10, the simplest that fit; what is "
        "deployed is LANet.",
        ((256, 128, 128), (256, 128, 10)),
    ),
)


def table2() -> list[dict[str, Any]]:
    """A dictionary per row: "system", "network", "classes", "remark", fields of `Count`, "printed" and "difference".

    Of one image of 256x256x3. printed: `Figures` as the paper has them. difference: ours, rounded to the table's two
    digits, minus the printed one: 0 where the figure fits. By tracing alone.
    """
    rows = []
    for row in ROWS:
        network = count(build_network(row.options, row.classes), SIZE, CHANNELS, row.reading)
        counted = Count(*(a + b for a, b in zip(network, _projectors(row.projectors), strict=True)))
        ours = Figures(counted.parameters / 1e6, counted.memory_mb, counted.flops / 1e9)
        difference = Figures(*(round(round(a, 2) - b, 2) for a, b in zip(ours, row.printed, strict=True)))
        rows.append(
            {"system": row.system, "network": row.network, "classes": row.classes}
            | counted._asdict()
            | {"printed": row.printed._asdict(), "difference": difference._asdict(), "remark": row.remark}
        )
    return rows
