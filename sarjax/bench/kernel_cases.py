"""The kernels that `sarjax.bench.kernels` measures: ours and what a user might take instead, on the same made-up input.

PyTorch's and numpy's sides are as one would write them there: whole batches, no copies that could be left out.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sarjax.augment.geometry import draw_view, geometry
from sarjax.augment.keys import row_keys
from sarjax.augment.radiometry import radiometry
from sarjax.config import Augment
from sarjax.evaluate.confusion import by_products, confusion_per_row
from sarjax.losses.contrastive import unit
from sarjax.losses.transport import transport
from sarjax.methods.neighbours import nearest, padded
from sarjax.spec import IGNORE_LABEL, BandSpec, ClassSpec, DatasetSpec, ModalitySpec

PEERS = {name: importlib.util.find_spec(module) is not None for name, module in (("torch", "torch"), ("pot", "ot"))}
CLASSES = 8
TILE = 256
ITERATIONS, EPSILON = 50, 0.05  # of Sinkhorn
CHANNELS, NEIGHBOURS, QUERIES = 512, 3, 1024  # of the bank of features; rows that a peer looks up at a time
LARGEST_MATRIX = 2**31  # bytes of similarities that are held at once
LOOKS, JITTER = 4.0, 0.2  # of the augmentation


class Case(NamedTuple):
    """A kernel at one size. sides: "ours" first; None where what it needs is not there.

    moved: the fewest bytes that are read and written. flops: the fewest operations. difference: how far another side's
    result is from ours.
    """

    sides: Mapping[str, Callable[[], Any] | None]
    moved: float
    flops: float
    difference: Callable[[Any, Any], float]


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees of numbers, of what either may call arrays."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in pairs)


# --- Transport


def sinkhorn(pixels: int) -> Case:
    """Ours (ott-jax), a plain loop in the log domain in jax, and POT's in numpy, with as many iterations.

    The difference is that of the plans, as a share of the largest entry. Each iteration has to read the costs: what a
    class asks for depends on all pixels.
    """
    r = np.random.default_rng(0)
    cost = r.uniform(0, 1, (pixels, CLASSES)).astype(np.float32)
    a, b = np.full(pixels, 1 / pixels, np.float32), r.dirichlet(np.ones(CLASSES)).astype(np.float32)
    on_device = [jnp.asarray(x) for x in (cost, a, b)]
    ours = jax.jit(lambda *x: transport(*x, epsilon=EPSILON, iterations=ITERATIONS).matrix)
    sides = {"ours": lambda: ours(*on_device), "loop": lambda: _sinkhorn_loop(*on_device), "pot": None}
    if PEERS["pot"]:
        import ot

        doubles = [x.astype(np.float64) for x in (cost, a, b)]
        doubles[2] /= doubles[2].sum()
        options = {"method": "sinkhorn_log", "numItermax": ITERATIONS, "stopThr": 0, "warn": False}
        sides["pot"] = lambda: ot.sinkhorn(doubles[1], doubles[2], doubles[0], EPSILON, **options)
    entries = pixels * CLASSES

    def difference(ours: Any, theirs: Any) -> float:
        return largest_difference(ours, theirs) / float(np.max(ours))

    return Case(sides, 4.0 * entries * (ITERATIONS + 1), 4.0 * entries * ITERATIONS, difference)


@jax.jit
def _sinkhorn_loop(cost, a, b):
    log_k, log_a, log_b = -cost / EPSILON, jnp.log(a), jnp.log(b)

    def step(_, uv):
        v = log_b - jax.nn.logsumexp(log_k + uv[0][:, None], 0)
        return log_a - jax.nn.logsumexp(log_k + v, 1), v

    u, v = lax.fori_loop(0, ITERATIONS, step, (jnp.zeros_like(a), jnp.zeros_like(b)))
    return jnp.exp(u[:, None] + log_k + v)


# --- Neighbours


def neighbours(tiles: int) -> Case:
    """Ours, blocked; the whole matrix of similarities at once in jax; blocked in PyTorch and numpy.

    The difference is that of the cosines of what is found.
    """
    bank = np.zeros((padded(tiles), CHANNELS), np.float32)
    bank[:tiles] = np.random.default_rng(0).standard_normal((tiles, CHANNELS))
    valid = np.arange(len(bank)) < tiles
    exact = bank[:tiles] / np.linalg.norm(bank[:tiles], axis=1, keepdims=True)
    on_device, rows = (jnp.asarray(bank), jnp.asarray(valid)), jnp.asarray(bank[:tiles])
    ours = jax.jit(nearest, static_argnums=2)
    sides: dict[str, Any] = {
        "ours": lambda: ours(*on_device, NEIGHBOURS)[:tiles],
        "whole matrix": (lambda: _nearest_at_once(rows)) if 4 * tiles**2 <= LARGEST_MATRIX else None,
        "numpy": lambda: _nearest_in_numpy(bank[:tiles]),
        "torch": None,
    }
    if PEERS["torch"]:
        from sarjax.bench import torch_kernels

        tensor = torch_kernels.placed(bank[:tiles])
        sides["torch"] = lambda: torch_kernels.nearest(tensor, NEIGHBOURS, QUERIES)

    def difference(ours: Any, theirs: Any) -> float:
        cosines = (np.einsum("nd,nkd->nk", exact, exact[np.asarray(table)]) for table in (ours, theirs))
        return largest_difference(*(np.sort(c) for c in cosines))

    moved = 4.0 * tiles * (CHANNELS + NEIGHBOURS)
    return Case(sides, moved, 2.0 * tiles**2 * CHANNELS, difference)


@jax.jit
def _nearest_at_once(bank):
    rows = unit(bank)
    similarity = jnp.matmul(rows, rows.T, precision=lax.Precision.HIGHEST)
    similarity = jnp.where(jnp.eye(len(rows), dtype=bool), -jnp.inf, similarity)
    return lax.top_k(similarity, NEIGHBOURS)[1]


def _nearest_in_numpy(bank):
    rows = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    found = []
    for start in range(0, len(rows), QUERIES):
        similarity = rows[start : start + QUERIES] @ rows.T
        here = np.arange(len(similarity))
        similarity[here, start + here] = -np.inf
        found.append(np.argpartition(similarity, -NEIGHBOURS, 1)[:, -NEIGHBOURS:])
    return np.concatenate(found)


# --- Confusion matrices


def confusions(tiles: int) -> Case:
    """Of class indices, by tile: ours as this platform counts, by products, `jnp.bincount`, numpy and PyTorch."""
    r = np.random.default_rng(0)
    shape = (tiles, TILE, TILE)
    predicted, label = (r.integers(0, CLASSES, shape).astype(np.uint8) for _ in range(2))
    label[r.random(shape) < 0.1] = IGNORE_LABEL
    row_valid = np.ones(tiles, np.uint8)
    on_device = [jnp.asarray(x) for x in (predicted, label, row_valid)]
    ours = jax.jit(lambda *x: confusion_per_row(*x, CLASSES))

    @jax.jit
    def products(predicted, label, _):
        keep = label != IGNORE_LABEL
        numbers = (x.astype(jnp.int32) for x in (label, predicted))
        return by_products(*numbers, keep, jnp.arange(CLASSES))

    @jax.jit
    def bincount(predicted, label, _):
        bins = CLASSES**2 + 1
        pair = jnp.where(label != IGNORE_LABEL, label.astype(jnp.int32) * CLASSES + predicted, CLASSES**2)
        pair += bins * jnp.arange(tiles)[:, None, None]
        return (
            jnp.bincount(pair.ravel(), length=tiles * bins).reshape(tiles, bins)[:, :-1].reshape(-1, CLASSES, CLASSES)
        )

    def in_numpy():
        bins = CLASSES**2 + 1
        pair = np.where(label != IGNORE_LABEL, label.astype(np.int64) * CLASSES + predicted, CLASSES**2)
        pair += bins * np.arange(tiles)[:, None, None]
        counted = np.bincount(pair.ravel(), minlength=tiles * bins).reshape(tiles, bins)
        return counted[:, :-1].reshape(-1, CLASSES, CLASSES)

    sides: dict[str, Any] = {
        "ours": lambda: ours(*on_device),
        "products": lambda: products(*on_device),
        "bincount": lambda: bincount(*on_device),
        "numpy": in_numpy,
        "torch": None,
    }
    if PEERS["torch"]:
        from sarjax.bench import torch_kernels

        tensors = torch_kernels.placed(predicted), torch_kernels.placed(label)
        sides["torch"] = lambda: torch_kernels.confusion(*tensors, CLASSES, IGNORE_LABEL)
    pixels = math.prod(shape)
    return Case(sides, 2.0 * pixels + 4.0 * tiles * CLASSES**2, 0.0, largest_difference)


# --- Augmentation of tiles of two sensors, one band of amplitude and four of reflectance, with labels

SPEC = DatasetSpec(
    "made up",
    (
        ModalitySpec("sar", (BandSpec("VV", "amplitude"),)),
        ModalitySpec("optical", tuple(BandSpec(name, "reflectance") for name in ("blue", "green", "red", "nir"))),
    ),
    (ClassSpec("land", (0, 0, 0)), ClassSpec("water", (0, 0, 255))),
)
SENSORS = tuple(m.name for m in SPEC.modalities)


def flips(tiles: int) -> Case:
    """Flips and quarter turns of a batch, of the same draws: ours, and PyTorch's tile by tile."""
    options = Augment(flip=True, rotate=True)
    return _moved(tiles, options, "flips", 0.0)


def views(tiles: int) -> Case:
    """Parts of tiles at the tile's size, flipped and turned: ours, and PyTorch's `grid_sample` of the whole batch.

    Grey values may differ by 1, where rounding is a matter of the last bit.
    """
    options = Augment(flip=True, rotate=True, region=0.5)
    return _moved(tiles, options, "views", 10.0)


def _moved(tiles: int, options: Augment, what: str, flops: float) -> Case:
    """flops: of a value of an image."""
    batch, key = _tiles(tiles), jax.random.key(0)
    on_device = jax.tree.map(jnp.asarray, batch)
    ours = jax.jit(lambda batch: geometry(batch, key, options))
    sides: dict[str, Any] = {"ours": lambda: ours(on_device), "torch": None}
    names = [*SENSORS, *(f"{name}_valid" for name in SENSORS), "label"]
    if PEERS["torch"]:
        from sarjax.bench import torch_kernels

        drawn = jax.jit(jax.vmap(lambda k: draw_view(k, TILE, TILE, options)))(row_keys(key, on_device))
        tensors = {name: torch_kernels.placed(_channels_first(name, batch[name])) for name in names}
        view = {name: torch_kernels.placed(np.asarray(value)) for name, value in drawn._asdict().items()}
        move = getattr(torch_kernels, what)
        sides["torch"] = lambda: move(tensors, view, SENSORS)

    def difference(ours: Any, theirs: Any) -> float:
        same = "row" in theirs
        return max(
            largest_difference(
                _channels_first(name, ours[name]), _channels_first(name, theirs[name]) if same else theirs[name].cpu()
            )
            for name in names
        )

    values = sum(batch[name].size for name in SENSORS)
    return Case(sides, 2.0 * sum(batch[name].nbytes for name in names), flops * values, difference)


def noise(tiles: int) -> Case:
    """Speckle of four looks on amplitude and jitter of reflectance: ours and PyTorch's.

    The jitter's draws are the same, so reflectances are compared pixel by pixel, as shares of the largest; of
    amplitudes, whose speckle is of another generator, the mean of the square, as a share.
    """
    batch, key, options = (
        _tiles(tiles),
        jax.random.key(0),
        Augment(flip=False, rotate=False, speckle=LOOKS, jitter=JITTER),
    )
    on_device = jax.tree.map(jnp.asarray, batch)
    ours = jax.jit(lambda batch: radiometry(batch, key, options, SPEC))
    sides: dict[str, Any] = {"ours": lambda: [ours(on_device)[name] for name in SENSORS], "torch": None}
    if PEERS["torch"]:
        from sarjax.bench import torch_kernels

        # As `radiometry` draws it for optical, the second sensor: contrast and brightness of each row.
        keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, 1))[1])(row_keys(key, on_device))
        shift = jax.vmap(lambda k: jax.random.uniform(k, (2, 1, 1, 1), minval=-1.0, maxval=1.0))(keys)
        contrast, brightness = (torch_kernels.placed(1 + JITTER * np.asarray(shift[:, i])) for i in range(2))
        tensors = {
            name: torch_kernels.placed(_channels_first(name, value)) for name, value in batch.items() if value.ndim > 3
        }
        sides["torch"] = lambda: torch_kernels.noise(tensors, LOOKS, contrast, brightness)

    def difference(ours: Any, theirs: Any) -> float:
        (sar, optical), (their_sar, their_optical) = (
            [_channels_first(name, x) if x.ndim == 5 else np.asarray(x) for name, x in zip(SENSORS, pair, strict=True)]
            for pair in (ours, theirs)
        )
        power = [float(np.mean(np.square(x, dtype=np.float64))) for x in (sar, their_sar)]
        return max(largest_difference(optical, their_optical) / float(optical.max()), abs(power[1] / power[0] - 1))

    images = [batch[name] for name in SENSORS]
    moved = sum(5 * x.size for x in images) + sum(batch[f"{name}_valid"].nbytes for name in SENSORS)
    return Case(sides, float(moved), 6.0 * sum(x.size for x in images), difference)


def _tiles(count: int) -> dict[str, np.ndarray]:
    """A batch of noise in which a twentieth of the pixels has no data."""
    r = np.random.default_rng(0)
    shape = (count, 1, TILE, TILE)
    batch: dict[str, np.ndarray] = {"row": np.arange(count, dtype=np.int32)}
    for modality in SPEC.modalities:
        batch[modality.name] = r.integers(1, 255, (*shape, len(modality.bands)), np.uint8)
        batch[f"{modality.name}_valid"] = (r.random(shape) > 0.05).astype(np.uint8)
    batch["label"] = r.integers(0, CLASSES, (count, TILE, TILE)).astype(np.uint8)
    return batch


def _channels_first(name: str, array: Any) -> np.ndarray:
    """(b, c, h, w) as PyTorch has it, of what we have of one date."""
    array = np.asarray(array)
    if name in SENSORS:
        return np.ascontiguousarray(np.moveaxis(array[:, 0], -1, 1))
    return array[:, None] if array.ndim == 3 else array
