"""What a run starts from: another run's weights, or an encoder's file."""

import dataclasses

import numpy as np
import pytest
import toy
from toy import train

from sarjax import config as configs
from sarjax.config import Mesh
from sarjax.errors import UserError
from sarjax.options import FCN, Supervised
from sarjax.train.mesh import make_mesh
from sarjax.train.run import read_manifest, restore_run


def test_warm_start_keeps_all_but_a_head_of_other_classes(tmp_path):
    cfg = toy.config(Supervised(), steps=2)
    train(cfg, tmp_path / "a")
    spec = dataclasses.replace(toy.SPEC, classes=toy.SPEC.classes[:2], excluded=())
    data = toy.dataset(spec=spec)
    still = dataclasses.replace(
        cfg, experiment=dataclasses.replace(cfg.experiment, optimizer=configs.Optimizer(learning_rate=0.0), steps=1)
    )
    second, said = train(still, tmp_path / "b", init_from=tmp_path / "a", dataset=data)
    assert any("fresh: " in line and "kernel" in line for line in said)
    assert read_manifest(tmp_path / "b")["init_from"] == str(tmp_path / "a")
    assert "init_from" not in read_manifest(tmp_path / "a")
    best = restore_run(tmp_path / "a", make_mesh(Mesh()))
    np.testing.assert_array_equal(
        second.params["encoder"]["conv1"]["kernel"], best.params["encoder"]["conv1"]["kernel"]
    )
    wider = dataclasses.replace(still.experiment, network=FCN(width=0.125, stages=1))
    with pytest.raises(UserError, match="has another network"):
        train(dataclasses.replace(still, experiment=wider), tmp_path / "c", init_from=tmp_path / "a", dataset=data)


def test_the_encoder_starts_from_a_file(tmp_path):
    from safetensors.numpy import save_file

    from sarjax.models.torchvision import layout

    rng = np.random.default_rng(0)
    shapes = {key: entry.shape for key, entry in layout("resnet18", width=0.0625).items()}
    weights = {key: rng.uniform(0.5, 1.0, shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(weights, tmp_path / "r18.safetensors")
    network = FCN(width=0.0625, stages=1, weights=str(tmp_path / "r18.safetensors"))
    still = configs.Optimizer(name="sgd", learning_rate=0.0, ema=0.5)
    state, _ = train(toy.config(Supervised(), network=network, optimizer=still, steps=1), tmp_path / "run")
    kernel = np.asarray(state.params["encoder"]["conv1"]["kernel"])
    expected = weights["conv1.weight"].mean(1, keepdims=True).transpose(2, 3, 1, 0) * 3
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.ema["encoder"]["conv1"]["kernel"], kernel)
    gone = toy.config(Supervised(), network=dataclasses.replace(network, weights=str(tmp_path / "gone.safetensors")))
    with pytest.raises(UserError, match=r"no weight file .*gone\.safetensors"):
        train(gone, tmp_path / "run2")
    assert not (tmp_path / "run2").exists(), "nothing half-written"


def test_equal_numbers_of_other_classes_get_a_fresh_head(tmp_path):
    train(toy.config(Supervised(), steps=1), tmp_path / "a")
    renamed = tuple(dataclasses.replace(c, name=f"other {c.name}") for c in toy.SPEC.classes)
    data = toy.dataset(spec=dataclasses.replace(toy.SPEC, classes=renamed, excluded=()))
    _, said = train(toy.config(Supervised(), steps=1, seed=1), tmp_path / "b", init_from=tmp_path / "a", dataset=data)
    assert any("fresh: " in line for line in said)
    _, said = train(toy.config(Supervised(), steps=1, seed=1), tmp_path / "c", init_from=tmp_path / "a")
    assert any("started from" in line and "fresh" not in line for line in said)
