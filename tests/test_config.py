"""Configurations: JSON out and in, and one sentence for a key, a type or a value that is wrong."""

import dataclasses
import json

import pytest

from sarjax import config as configs
from sarjax import recipes
from sarjax.config import Augment, Config, Data, Execution, Experiment, from_dict, from_json, to_dict, to_json, validate
from sarjax.errors import UserError
from sarjax.options import FCN


@pytest.mark.parametrize("preset", ["", *recipes.PRESETS])
@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
def test_every_recipe_comes_back_from_json(recipe, preset):
    config = recipes.find(recipe, preset)
    back = from_json(to_json(config))
    assert back == config
    assert type(back.experiment.network) is type(config.experiment.network)
    assert type(back.experiment.method) is type(config.experiment.method)
    assert to_json(back) == to_json(config)
    validate(back)


def test_a_whole_number_for_a_float_is_the_same_configuration():
    assert to_json(Config(experiment=Experiment(epochs=50))) == to_json(Config(experiment=Experiment(epochs=50.0)))


def changed(key, value):
    """The default configuration's dict with the dotted `key` set."""
    d = to_dict(Config())
    *path, last = key.split(".")
    inner = d
    for name in path:
        inner = inner[name]
    inner[last] = value
    return d


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("experimnt", "experiment"),
        ("experiment.batchsize", "experiment.batch_size"),
        ("experiment.network.widht", "experiment.network.width"),
        ("execution.mesh.spaces", "execution.mesh.space"),
    ],
)
def test_unknown_key(key, near):
    with pytest.raises(UserError, match=f"unknown key '{key}': did you mean '{near}'"):
        from_dict(Config, changed(key, 1))


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("experiment.batch_size", "8", "int"),
        ("experiment.batch_size", 8.0, "int"),
        ("experiment.batch_size", True, "int"),
        ("experiment.epochs", True, "float"),
        ("experiment.augment.flip", 1, "bool"),
        ("experiment.precision", "float16", "'float32', 'bfloat16'"),
        ("experiment.network.output_stride", 4, "8, 16, 32"),
        ("experiment.inputs.modalities", "sar", "tuple"),
        ("experiment.data", 3, "an object"),
    ],
)
def test_wrong_type(key, value, accepted):
    with pytest.raises(UserError) as e:
        from_dict(Config, changed(key, value))
    assert key in str(e.value)
    assert repr(value) in str(e.value)
    assert accepted in str(e.value)


def test_unknown_kind_of_network_and_no_object():
    with pytest.raises(UserError, match=r"unknown experiment.network name 'lannet': did you mean 'lanet'"):
        from_dict(Config, changed("experiment.network.name", "lannet"))
    with pytest.raises(UserError, match="should be an object"):
        from_json("[]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment.batch_size", 0),
        ("experiment.accumulate", 0),
        ("experiment.steps", -1),
        ("experiment.epochs", 0.0),
        ("experiment.epochs", float("nan")),
        ("experiment.epochs", float("inf")),
        ("experiment.data.labelled", 0.0),
        ("experiment.data.labelled", 1.5),
        ("experiment.inputs.modalities", []),
        ("experiment.inputs.local_mean", -3),
        ("experiment.inputs.repeat", -1),
        ("experiment.network.width", 0.0),
        ("experiment.augment.crop", -1),
        ("experiment.augment.scale", -0.5),
        ("experiment.augment.region", 1.5),
        ("experiment.augment.speckle", -1.0),
        ("experiment.augment.jitter", -0.1),
        ("experiment.optimizer.learning_rate", -1e-3),
        ("experiment.optimizer.learning_rate", float("nan")),
        ("experiment.optimizer.weight_decay", -1e-3),
        ("experiment.optimizer.warmup", 1.5),
        ("experiment.optimizer.clip", -1.0),
        ("experiment.optimizer.ema", 1.0),
        ("experiment.optimizer.ema", -0.1),
        ("execution.host_devices", -1),
        ("execution.log_every", -1),
        ("execution.evaluate_every", -1),
        ("execution.checkpoint_every", -1),
        ("execution.keep", 0),
        ("execution.max_bad_steps", 0),
        ("execution.prefetch", -1),
    ],
)
def test_a_value_that_makes_no_sense(key, value):
    config = from_dict(Config, changed(key, value))
    with pytest.raises(UserError) as e:
        validate(config)
    assert str(e.value).startswith(f"{key} is {value!r}, but should be ")


def test_zoom_and_region_exclude_each_other():
    config = Config(experiment=Experiment(augment=Augment(scale=0.5, region=0.5)))
    with pytest.raises(UserError, match="one of them should be 0"):
        validate(config)


def test_the_ends_of_the_ranges_are_accepted():
    for key, value in [
        ("experiment.batch_size", 1),
        ("experiment.data.labelled", 1.0),
        ("experiment.data.labelled", 1e-9),
        ("experiment.optimizer.learning_rate", 0.0),
        ("experiment.optimizer.warmup", 1.0),
        ("experiment.optimizer.ema", 0.0),
        ("execution.log_every", 0),
        ("execution.prefetch", 0),
    ]:
        validate(from_dict(Config, changed(key, value)))


def test_every_checked_key_exists():
    flat = {line.split(":")[0] for line in configs.difference({}, to_dict(Config()))}
    assert flat == {"experiment", "execution", "recipe"}, "an absent branch is one line"
    for key in configs._ACCEPTED:
        value = to_dict(Config())
        for name in key.split("."):
            value = value[name]


def test_difference():
    old = Config("a", Experiment(data=Data(labelled=0.1)), Execution())
    assert configs.difference(old, old) == []
    new = dataclasses.replace(old, experiment=Experiment(data=Data(labelled=0.5), batch_size=4, network=FCN()))
    lines = configs.difference(old, new)
    assert "experiment.data.labelled: 0.1 -> 0.5" in lines
    assert "experiment.batch_size: 8 -> 4" in lines
    assert "experiment.network.name: 'lanet' -> 'fcn'" in lines
    assert "experiment.network.residual: True -> None" in lines
    assert json.loads(to_json(new))["experiment"]["network"]["name"] == "fcn"
