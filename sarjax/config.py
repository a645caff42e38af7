"""A run's configuration: frozen dataclasses, JSON out and in, unknown key = error.

`Experiment` is a run's identity: changing it in an existing run is refused. `Execution` is how and where it
runs: it may change freely. Options of networks and methods live in `sarjax.options`, one small file per paper;
they are told apart in JSON by their `name`.
"""

import dataclasses
import functools
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sarjax.errors import UserError, unknown
from sarjax.options import LANet, MethodOptions, NetworkOptions, Supervised
from sarjax.options.base import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_COUNT, SHARE, Accepts


@dataclasses.dataclass(frozen=True)
class Data:
    """Which built records a run learns from.

    name, config: the builder and its configuration ("" = the builder's default).
    labelled: share of the training tiles whose labels may be used: nested, drawn by `labelled_seed`.
    fingerprint: of records, spec and statistics; filled in at a run's first start.
    """

    name: str = "whu_opt_sar"
    config: str = ""
    labelled: float = 1.0
    labelled_seed: int = 0
    fingerprint: Annotated[str, tyro.conf.Suppress] = ""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a network sees of a batch: channels in the order modality, date, band; derived channels last.

    modalities: which sensors. dates: which acquisitions ("all", or indices); several are stacked on channels.
    normalisation: "dataset" = (x - mean) / std of the training split; "tile" = each image (tile, date) by its own
    valid pixels, for data that were stretched image by image. Invalid pixels become 0.
    local_mean: side of a box in pixels; adds every channel's local mean (0 = none).
    date_difference: adds last minus first date of every channel (of the local means, where there are any).
    repeat: repeats the channels cyclically up to this number (0 = leave them), for 3-channel networks on SAR.
    by_date: all channels of one date, derived ones too, before those of the next, for networks that compare dates;
    `repeat` is then of each date.
    """

    modalities: tuple[str, ...] = ("sar",)
    dates: tuple[int, ...] | Literal["all"] = "all"
    normalisation: Literal["dataset", "tile"] = "dataset"
    local_mean: int = 0
    date_difference: bool = False
    repeat: int = 0
    by_date: bool = False


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random geometry, shared by everything in a row, and radiometry, per modality. All zeros/False = identity.

    crop: side in pixels of a random crop (0 = whole tile). flip, rotate: the eight symmetries of the square.
    scale: random zoom by a factor in [1/(1+scale), 1+scale]. region: random resized crop: the view shows a part of the
    tile whose side is at least this share of the tile's, resampled to the view's size (0 = none). speckle: looks of
    multiplicative gamma noise on amplitude and intensity bands, or its equivalent on dB bands (0 = none). jitter:
    relative brightness and contrast of reflectance and stretched bands. swap_dates: reverse the dates with
    probability 1/2.
    """

    crop: int = 0
    flip: bool = True
    rotate: bool = True
    scale: float = 0.0
    region: float = 0.0
    speckle: float = 0.0
    jitter: float = 0.0
    swap_dates: bool = False


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Optimizer and schedule.

    schedule: "poly" = lr (1 - t)^power, "cosine" to 0, "constant"; all after a linear warm-up of `warmup` steps (a
    share of the run). clip: largest global gradient norm (0 = none). ema: decay of the parameters' running mean
    (0 = none). weight_decay: L2 in the gradient for sgd, decoupled for adamw; never on norms and biases.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    momentum: float = 0.9
    nesterov: bool = True
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 1.5
    warmup: float = 0.05
    clip: float = 0.0
    ema: float = 0.0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run's identity.

    batch_size: rows of the global batch, over all devices. epochs: passes over the labelled training tiles; `steps`
    > 0 says it in steps instead. accumulate: microbatches per step (couples batch-norm to the microbatch).
    precision: compute dtype of the networks; parameters, statistics and losses stay float32.
    """

    data: Data = Data()
    inputs: Inputs = Inputs()
    network: NetworkOptions = LANet()
    method: MethodOptions = Supervised()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    batch_size: int = 8
    epochs: float = 30.0
    steps: int = 0
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis; -1 takes what is left. See `sarjax.train.mesh`.

    space, beside more than one device along the others, needs images of 128 lines (`feed.LEAST_LINES_IN_STRIPS`).
    """

    data: int = -1
    fsdp: int = 1
    space: int = 1


@dataclasses.dataclass(frozen=True)
class Execution:
    """How and where a run runs.

    data_dir: where built records are ("" = $SARJAX_DATA_DIR, else ~/sarjax_data). host_devices: CPU devices
    (0 = one per core), fixed at a run's first start. evaluate_every, checkpoint_every, log_every: in steps
    (0 = once an epoch, at most 100 times a run; log_every 0 = never). keep: newest checkpoints kept. keep_best: also
    keep the best on val. max_bad_steps: non-finite steps in a row that stop the run. prefetch: batches read ahead.
    """

    mesh: Mesh = Mesh()
    data_dir: str = ""
    host_devices: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    keep_best: bool = True
    max_bad_steps: int = 10
    prefetch: int = 2
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """All of a run: `config.json`."""

    recipe: str = ""
    experiment: Experiment = Experiment()
    execution: Execution = Execution()


# What types cannot say. What depends on the data set or on the devices is said where these are known.
_ACCEPTED: dict[str, Accepts] = {
    "experiment.batch_size": POSITIVE_COUNT,
    "experiment.accumulate": POSITIVE_COUNT,
    "experiment.steps": COUNT,
    "experiment.epochs": POSITIVE,
    "experiment.seed": COUNT,
    "experiment.data.labelled_seed": COUNT,
    "experiment.data.labelled": ("a share above 0 and up to 1", lambda v: 0 < v <= 1),
    "experiment.inputs.modalities": ("at least one sensor", lambda v: len(v) > 0),
    "experiment.inputs.local_mean": ("the side of a box in pixels, or 0 for none", lambda v: v >= 0),
    "experiment.inputs.repeat": ("a number of channels, or 0 to leave them", lambda v: v >= 0),
    "experiment.network.width": POSITIVE,
    "experiment.augment.crop": COUNT,
    "experiment.augment.scale": NOT_NEGATIVE,
    "experiment.augment.region": SHARE,
    "experiment.augment.speckle": NOT_NEGATIVE,
    "experiment.augment.jitter": NOT_NEGATIVE,
    "experiment.optimizer.learning_rate": NOT_NEGATIVE,
    "experiment.optimizer.weight_decay": NOT_NEGATIVE,
    "experiment.optimizer.warmup": SHARE,
    "experiment.optimizer.clip": NOT_NEGATIVE,
    "experiment.optimizer.ema": ("a decay from 0 to below 1", lambda v: 0 <= v < 1),
    "execution.host_devices": COUNT,
    "execution.log_every": COUNT,
    "execution.evaluate_every": COUNT,
    "execution.checkpoint_every": COUNT,
    "execution.keep": POSITIVE_COUNT,
    "execution.max_bad_steps": POSITIVE_COUNT,
    "execution.prefetch": COUNT,
}


def validate(config: Config) -> None:
    """UserError that names the first key whose value is of the right type, but makes no sense, and what would."""
    for key, (accepted, accepts) in _ACCEPTED.items():
        value = functools.reduce(getattr, key.split("."), config)
        if not accepts(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{key} is {shown!r}, but should be {accepted}.")
    augment = config.experiment.augment
    if augment.scale and augment.region:
        raise UserError(
            f"experiment.augment.scale is {augment.scale} and experiment.augment.region {augment.region}: a view is "
            "zoomed or cut out and resampled, so one of them should be 0."
        )


def to_dict(value: Any) -> Any:
    """A dataclass as plain JSON values; options carry their `name`, by which `from_dict` finds their class."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        d = {f.name: _plain(hints[f.name], getattr(value, f.name)) for f in dataclasses.fields(value)}
        tag = getattr(type(value), "NAME", None)
        return {"name": tag, **d} if tag else d
    if isinstance(value, tuple):
        return [to_dict(v) for v in value]
    return value


def _plain(hint: Any, value: Any) -> Any:
    """A whole number given for a float is that float, so that equal configurations are equal as text."""
    return float(value) if hint is float else to_dict(value)


def from_dict(cls: type, d: Any, where: str = "") -> Any:
    """The dataclass `cls` from what `to_dict` made; UserError for an unknown key or a value of a wrong type."""
    if not isinstance(d, dict):
        raise UserError(f"{where or 'the configuration'} should be an object, not {d!r}.")
    d = dict(d)
    if hasattr(cls, "registry"):
        name, kinds = d.pop("name", None), cls.registry()
        if name not in kinds:
            raise unknown(f"{where} name", str(name), kinds)
        cls = kinds[name]
    hints = typing.get_type_hints(cls)
    for key in d:
        if key not in hints:
            raise unknown("key", f"{where}.{key}".lstrip("."), [f"{where}.{k}".lstrip(".") for k in hints])
    return cls(**{key: _value(hints[key], v, f"{where}.{key}".lstrip(".")) for key, v in d.items()})


def _value(hint: Any, v: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, v, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return _value(arg, v, where)
            except UserError:
                continue
    elif origin is Literal:
        if v in args:
            return v
    elif origin is tuple:
        if isinstance(v, list | tuple) and (args[-1] is Ellipsis or len(v) == len(args)):
            kinds = [args[0]] * len(v) if args[-1] is Ellipsis else args
            return tuple(_value(kind, x, where) for kind, x in zip(kinds, v, strict=True))
    elif hint is float and isinstance(v, int | float) and not isinstance(v, bool):
        return float(v)
    elif isinstance(hint, type) and type(v) is hint:
        return v
    accepted = ", ".join(map(repr, args)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where} is {v!r}, but should be {accepted}.")


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=1) + "\n"


def from_json(text: str, cls: type = Config) -> Any:
    return from_dict(cls, json.loads(text))


def read(path: Path) -> Config:
    """The configuration in a `config.json`; UserError, naming the file, where it holds none."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; the config.json of a run is accepted.") from e
    except (ValueError, UserError) as e:
        raise UserError(f"{path} is no configuration ({str(e).rstrip('.')}); a run's config.json is accepted.") from e


def difference(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf in which two configurations differ."""
    a, b = (to_dict(x) if dataclasses.is_dataclass(x) else x for x in (old, new))
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [line for k in keys for line in difference(a.get(k), b.get(k), f"{where}.{k}".lstrip("."))]
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]
