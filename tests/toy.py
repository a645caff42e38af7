"""A data set in memory, and a method that uses everything a method may have, at toy size."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sarjax.config import Augment, Config, Data, Execution, Experiment, Inputs, Optimizer
from sarjax.errors import UserError
from sarjax.evaluate.evaluator import on_host
from sarjax.methods import METHODS
from sarjax.methods.record import Head, Method, Outputs, Rest, Term, Variables
from sarjax.models.segmenters import FieldOfView
from sarjax.options import FCN, MethodOptions, NetworkOptions
from sarjax.spec import BandSpec, BandStatistics, ClassSpec, DatasetSpec, ModalitySpec, Statistics, Stream
from sarjax.train import loop

SPEC = DatasetSpec(
    name="toy",
    modalities=(
        ModalitySpec("sar", (BandSpec("VV", "amplitude"),)),
        ModalitySpec("optical", (BandSpec("red", "reflectance"), BandSpec("nir", "reflectance"))),
    ),
    classes=(ClassSpec("land", (200, 180, 120)), ClassSpec("water", (0, 0, 255)), ClassSpec("absent", (9, 9, 9))),
    excluded=("absent",),
)
SIZES = {"train": 12, "val": 5, "test": 3}


@dataclasses.dataclass(frozen=True)
class MemoryDataset:
    """What `sarjax.data.store.Dataset` offers, over arrays; one tile is ignored whole, every fifth has no-data."""

    spec: DatasetSpec
    statistics: Statistics
    fingerprint: str
    tiles: Mapping[str, list]

    splits = tuple(SIZES)
    directory = "memory"

    @property
    def tile(self):
        return self.tiles["train"][0]["label"].shape

    def split(self, name, modalities=None):
        kept = self.spec.modality_names if modalities is None else modalities
        keys = ("id", "label", *kept, *(f"{m}_valid" for m in kept))
        return [{k: tile[k] for k in keys} for tile in self.tiles[name]]


def dataset(size: int = 32, seed: int = 0, spec: DatasetSpec = SPEC) -> MemoryDataset:
    rng = np.random.default_rng(seed)
    tiles, identity = {}, 0
    for name, count in SIZES.items():
        tiles[name] = []
        for i in range(count):
            label = (np.add.outer(np.arange(size), np.arange(size)) > rng.integers(size // 2, size)).astype(np.uint8)
            sar = np.clip(rng.gamma(4, 20, (1, size, size, 1)) * (1 - 0.7 * label[..., None]), 1, 255).astype(np.uint8)
            shade = np.stack([120 - 80 * label, 160 - 120 * label], -1)[None]
            optical = np.clip(shade + rng.normal(0, 9, shade.shape), 1, 255).astype(np.uint8)
            valid = np.ones((1, size, size), np.uint8)
            if i % 5 == 4:
                valid[:, :4] = 0
                sar[:, :4], optical[:, :4], label[:4] = 0, 0, 255
            if name == "train" and i == 3:
                label[:] = 255
            tile = {"id": np.int32(identity), "label": label, "sar": sar, "optical": optical}
            tiles[name].append(tile | {"sar_valid": valid, "optical_valid": valid})
            identity += 1
    bands = {
        "sar": BandStatistics((60.0,), (40.0,), (0.0,), (255.0,), 1000),
        "optical": BandStatistics((90.0, 100.0), (45.0, 60.0), (0.0, 0.0), (255.0, 255.0), 1000),
    }
    statistics = Statistics(bands, (700, 300, 0), dict(SIZES), {})
    return MemoryDataset(spec, statistics, f"toy-{size}-{seed}", tiles)


@dataclasses.dataclass(frozen=True)
class ToyNetwork(NetworkOptions):
    """The toy method builds no network; this only names that."""

    NAME: ClassVar[str] = "toy-network"


@dataclasses.dataclass(frozen=True)
class Toy(MethodOptions):
    """taught: needs a teacher. explode_at: the step whose loss is made infinite (-1 = none). moving: statistics move,
    so that a microbatch sees those that the one before left."""

    NAME: ClassVar[str] = "toy"
    taught: bool = False
    explode_at: int = -1
    moving: bool = True


METHODS["toy"] = "toy:toy"
BANK = 4096


def config(method: MethodOptions | None = None, **changes) -> Config:
    """A run of eight rows a step on the toy data set; `changes` go to the experiment."""
    experiment = Experiment(
        data=Data("toy"),
        inputs=Inputs(modalities=("sar",)),
        network=ToyNetwork() if isinstance(method, Toy) else FCN(width=0.0625, stages=1),
        augment=Augment(flip=True, rotate=True),
        optimizer=Optimizer(name="sgd", learning_rate=0.05, schedule="cosine", warmup=0.1),
        batch_size=8,
        steps=6,
    )
    experiment = dataclasses.replace(experiment, **({"method": method} if method else {}), **changes)
    execution = Execution(log_every=1, checkpoint_every=2, evaluate_every=3, tensorboard=False, prefetch=1)
    return Config("toy", experiment, execution)


def _conv(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def toy(options: Toy, context) -> Method:
    """Two streams (the second follows the first through a table in memory), a teacher, memory, two heads."""
    classes = context.spec.num_classes

    def image(batch):
        return batch["sar"][:, 0].astype(jnp.float32) / 100.0

    def init(key):
        a, b, c = jax.random.split(key, 3)
        params = {
            "encoder": {"kernel": 0.1 * jax.random.normal(a, (3, 3, 1, 16))},
            "main": {"kernel": 0.1 * jax.random.normal(b, (1, 1, 16, classes))},
            "other": {"kernel": 0.1 * jax.random.normal(c, (1, 1, 16, classes))},
        }
        memory = {
            "bank": jnp.zeros((BANK, 16)),
            "neighbours": jnp.full((SIZES["train"], 2), -1, jnp.int32),
            "prototype": jnp.zeros((classes, 16)),
        }
        return Variables(params, {"mean": jnp.zeros(16)}, memory)

    def encode(params, stats, inputs, train):
        return {1: jax.nn.relu(_conv(params["encoder"]["kernel"], inputs) - stats["mean"])}

    def head(name):
        def predict(params, stats, batch):
            return _conv(params[name]["kernel"], encode(params, stats, image(batch), False)[1])

        return predict

    def loss(params, rest: Rest, batch, key, step):
        rows, partners = batch["labelled"], batch["partner"]
        noise = jax.vmap(lambda r: jax.random.normal(jax.random.fold_in(key, r), rows["label"].shape[1:]))(rows["row"])
        features = encode(params, rest.stats, image(rows) + 0.1 * noise[..., None], True)[1]
        logits = _conv(params["main"]["kernel"], features)
        label = rows["label"]
        valid = (label != 255).astype(jnp.float32)
        target = jax.nn.one_hot(label, classes)
        error = -jnp.sum(target * jax.nn.log_softmax(logits), -1)
        blown = jnp.where(step == options.explode_at, jnp.inf, 1.0)
        terms = {"main": Term(jnp.sum(error * valid) * blown, jnp.sum(valid))}
        other = head("other")(params, rest.stats, partners)
        theirs = jnp.sum(jax.nn.one_hot(partners["label"], classes) * jax.nn.log_softmax(other), -1)
        count = jnp.sum((partners["label"] != 255).astype(jnp.float32))
        terms["partner"] = Term(-jnp.sum(theirs), count, 0.5)
        if options.taught:
            frozen = rest.frozen
            taught = context.teacher.method.heads["main"].predict(frozen.params, frozen.stats, rows)
            soft = jax.nn.softmax(taught)
            terms["taught"] = Term(-jnp.sum(soft * jax.nn.log_softmax(logits)), valid.size * 1.0, 0.3)
        per_class = jnp.einsum("bhwk,bhwc->kc", target, jax.lax.stop_gradient(features))
        memory = rest.memory | {"prototype": 0.9 * rest.memory["prototype"] + 0.1 * per_class / valid.size}
        share = 0.1 if options.moving else 0.0
        stats = {"mean": (1 - share) * rest.stats["mean"] + share * jax.lax.stop_gradient(features).mean((0, 1, 2))}
        return terms, Outputs(stats, memory, {"hits": Term(jnp.sum((logits.argmax(-1) == label) * valid), valid.sum())})

    def refresh(params, stats, memory, batches, epoch):
        bank, seen = np.zeros((BANK, 16), np.float32), 0
        for batch in batches:
            pooled = on_host(encode(params, stats, image(batch), False)[1].mean((1, 2)))
            keep = on_host(batch["row_valid"]) > 0
            bank[seen : seen + keep.sum()] = pooled[keep]
            seen += int(keep.sum())
        distance = np.abs(bank[:seen, None] - bank[None, :seen]).sum(-1) + 1e9 * np.eye(seen)
        table = np.full((SIZES["train"], 2), -1, np.int32)
        table[:, 0] = distance.argmin(1)
        return memory | {"bank": jnp.asarray(bank), "neighbours": jnp.asarray(table)}

    def fits(teacher):
        if teacher.spec.num_classes != classes:
            raise UserError(f"the teacher knows {teacher.spec.num_classes} classes, the data set {classes}.")

    needs = ("sar", "sar_valid")
    method = Method(
        streams={"labelled": Stream("labelled"), "partner": Stream("follow", 1.0, "labelled", "neighbours")},
        init=init,
        loss=loss,
        encode=encode,
        heads={name: Head(needs, head(name), FieldOfView(1, 1)) for name in ("main", "other")},
        requires=(*needs, "label"),
        refresh=refresh,
        teacher=fits if options.taught else None,
    )
    return with_small_features(method, image)


def with_small_features(method: Method, image, weight: float = 0.01) -> Method:
    """An auxiliary objective: features are kept small through a scale that it learns itself."""

    def init(key):
        variables = method.init(key)
        return variables._replace(params=variables.params | {"auxiliary": {"scale": jnp.ones(16)}})

    def loss(params, rest, batch, key, step):
        terms, outputs = method.loss(params, rest, batch, key, step)
        features = method.encode(params, rest.stats, image(batch["labelled"]), True)[1]
        rows = features.shape[0] * 1.0
        size = jnp.sum(jnp.mean((features * params["auxiliary"]["scale"]) ** 2, (1, 2, 3)))
        return terms | {"small": Term(size, rows, weight)}, outputs

    return method._replace(init=init, loss=loss)


def train(cfg, workdir, **kwargs):
    """Of the toy data set, unless `dataset` is given: (state, what was said)."""
    said = []
    state = loop.train(cfg, workdir, say=said.append, **({"dataset": dataset()} | kwargs))
    return state, said


def scored(b=8, h=12, w=9, k=5, seed=0):
    """Logits, labels and which rows count: class k-1 is never true, class k-2 never predicted, row 1 is ignored, row 2
    is padding, labels have a stray 200.
    """
    r = np.random.default_rng(seed)
    logits = (5 * r.standard_normal((b, h, w, k))).astype(np.float32)
    logits[..., k - 2] = -45
    label = r.integers(0, k - 1, (b, h, w)).astype(np.uint8)
    label[r.random((b, h, w)) < 0.2] = 255
    label[0, 0, 0] = 200
    label[1] = 255
    row_valid = np.ones(b, np.uint8)
    row_valid[2] = 0
    return logits, label, row_valid
