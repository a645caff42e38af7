"""A checkpoint is trusted when every byte is as it was written, and not otherwise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarjax import config
from sarjax.errors import UserError
from sarjax.train.checkpoint import Checkpoints
from sarjax.train.mesh import make_mesh, replicated


@pytest.fixture
def saved(tmp_path):
    """Steps 1 and 2, whose one leaf holds the step."""
    said = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.full((64, 64), float(step)), "none": None}, {"at": step})
    checkpoints.wait()
    return checkpoints, said, tmp_path


ABSTRACT = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32), "none": None}


def abstract():
    sharding = replicated(make_mesh(config.Mesh(), jax.devices()[:4]))
    return {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding), "none": None}


def payload(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_the_newest_comes_back_on_todays_mesh(saved):
    checkpoints, said, _ = saved
    state, position = checkpoints.restore(abstract())
    np.testing.assert_array_equal(state["w"], 2.0)
    assert (position, said, len(state["w"].sharding.device_set)) == ({"at": 2}, [], 4)


def test_copies_on_several_devices_are_saved_without_compiling(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = jax.device_put(
        {"a": np.arange(48.0).reshape(8, 6), "b": np.arange(7)}, replicated(make_mesh(config.Mesh()))
    )
    with jax.log_compiles():
        jax.jit(lambda x: x + 41)(1)
        assert "Compiling" in caplog.text
        caplog.clear()
        checkpoints.save(1, state, {})
        checkpoints.wait()
    assert "Compiling" not in caplog.text
    found, _ = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)
    checkpoints.close()


def test_keeps_the_newest_and_their_digests(saved):
    checkpoints, _, tmp_path = saved
    checkpoints.save(3, {"w": jnp.zeros((64, 64)), "none": None}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.json")) == ["2.digests.json", "3.digests.json"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "word"), [(flip, "have changed"), (truncate, "bytes instead of"), (lambda p: p.unlink(), "is missing")]
)
def test_damage_is_named_and_the_one_before_is_used(saved, harm, word):
    checkpoints, said, tmp_path = saved
    harm(payload(tmp_path / "checkpoints" / "2"))
    state, position = checkpoints.restore(abstract())
    np.testing.assert_array_equal(state["w"], 1.0)
    assert position == {"at": 1}
    assert len(said) == 1
    assert "checkpoints/2 is damaged" in said[0]
    assert word in said[0]
    assert (tmp_path / "damaged" / "checkpoints-2").is_dir(), "nothing is lost"
    checkpoints.save(2, {"w": jnp.full((64, 64), 5.0), "none": None}, {})
    checkpoints.wait()
    assert checkpoints.fault(2) is None


def test_every_file_is_covered(saved):
    checkpoints, _, tmp_path = saved
    folder = tmp_path / "checkpoints" / "2"
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    for path in files:
        before = path.read_bytes()
        flip(path)
        assert checkpoints.fault(2) is not None, path
        path.write_bytes(before)
    assert checkpoints.fault(2) is None
    assert len(json.loads((tmp_path / "checkpoints" / "2.digests.json").read_text())) >= len(files)


def test_one_without_digests_was_never_finished(saved):
    checkpoints, said, tmp_path = saved
    (tmp_path / "checkpoints" / "2.digests.json").unlink()
    assert checkpoints.restore(abstract())[1] == {"at": 1}
    assert "never finished" in said[0]


def test_none_whole_is_an_error(saved):
    checkpoints, _, tmp_path = saved
    for step in "12":
        flip(payload(tmp_path / "checkpoints" / step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        checkpoints.restore(abstract())


def test_a_reader_passes_over_what_is_damaged_and_moves_nothing(saved):
    _, _, tmp_path = saved
    flip(payload(tmp_path / "checkpoints" / "2"))
    said = []
    state, _ = Checkpoints(tmp_path / "checkpoints", read_only=True, say=said.append).restore(abstract())
    np.testing.assert_array_equal(state["w"], 1.0)
    assert len(said) == 1
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert not (tmp_path / "damaged").exists()


def test_none_at_all(tmp_path):
    assert Checkpoints(tmp_path / "empty").restore(ABSTRACT) is None


def test_another_network_is_a_sentence(saved):
    checkpoints, _, _ = saved
    other = abstract() | {"w": jax.ShapeDtypeStruct((3, 3), jnp.float32, sharding=abstract()["w"].sharding)}
    with pytest.raises(UserError, match="does not fit this experiment"):
        checkpoints.restore(other)


def test_shapes_are_read_from_the_files(saved):
    _, _, tmp_path = saved
    reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert jax.tree.map(lambda s: s.shape, reader.stored(2)) == {"w": (64, 64), "none": None}
