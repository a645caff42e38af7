"""Runs whose files fail them: disks that are full or read-only, damaged files, two starts in one directory.

What they say, that nothing is lost, and that they end with what an undisturbed run ends with.
"""

import dataclasses
import os
import resource
import shutil
import time

import jax
import numpy as np
import pytest
import toy

from sarjax import recipes
from sarjax.config import Mesh
from sarjax.errors import UserError
from sarjax.files import held
from sarjax.options import FCN, Supervised
from sarjax.train import loop
from sarjax.train.checkpoint import Checkpoints
from sarjax.train.loggers import read_metrics

STEPS = 6


def config(**execution):
    cfg = toy.config(toy.Toy(), steps=STEPS)
    return dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, **execution))


def at_step(monkeypatch, step, happens):
    """Runs `happens` when a run has taken `step` steps."""
    advance = loop.Terminal.advance

    def watched(self, done):
        advance(self, done)
        if done == step:
            happens()

    monkeypatch.setattr(loop.Terminal, "advance", watched)


def stopped_at(step, cfg, workdir, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopFlag, "requested", lambda self, done: done == step)
        return toy.train(cfg, workdir, **kwargs)


def assert_same(state, whole):
    for name in ("params", "stats", "memory", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((getattr(state, name), getattr(whole, name))))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return toy.train(config(), tmp_path_factory.mktemp("runs") / "undisturbed")[0]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


HARM = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes instead of"),
    "a byte flipped": (flip, "have changed"),
    "a file missing": (lambda path: path.unlink(), "is missing"),
    "no digests": (lambda path: (path.parents[3] / "4.digests.json").unlink(), "never finished"),
}


@pytest.mark.parametrize("harm", HARM)
def test_the_newest_checkpoint_is_damaged(undisturbed, tmp_path, harm):
    stopped_at(4, config(), tmp_path)
    folder = tmp_path / "checkpoints" / "4"
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d" and p.parents[1].name == "state"]
    act, word = HARM[harm]
    act(max(files, key=lambda p: p.stat().st_size))
    state, said = toy.train(config(), tmp_path)
    assert any("checkpoints/4 is damaged" in line and word in line for line in said)
    assert any("resuming at step 2" in line for line in said)
    assert_same(state, undisturbed)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("mesh", "step", "said_of_it"), [(Mesh(4, 2), 3, "mesh.fsdp: 1 -> 2"), (Mesh(1, 1, 8), 4, "mesh.space: 1 -> 8")]
)
def test_resumed_on_another_mesh(undisturbed, tmp_path, mesh, step, said_of_it):
    stopped_at(step, config(), tmp_path)
    state, said = toy.train(config(mesh=mesh), tmp_path)
    assert any("not bit-identical" in line and said_of_it in line for line in said)
    assert ("fsdp" in state.memory["bank"].sharding.spec) == (mesh.fsdp > 1)
    for name in ("params", "stats", "memory"):
        for a, b in zip(*map(jax.tree.leaves, (getattr(state, name), getattr(undisturbed, name))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_disk_is_full(tmp_path, monkeypatch):
    """From step 4 on files may not grow beyond 8 KiB, and a checkpoint's do."""
    cfg = toy.config(Supervised(), network=FCN(width=0.25, stages=1), steps=STEPS)
    cfg = dataclasses.replace(cfg, execution=dataclasses.replace(cfg.execution, evaluate_every=STEPS))
    whole, _ = toy.train(cfg, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        while not (tmp_path / "run" / "checkpoints" / "2").exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, before[1]))

    with monkeypatch.context() as patch:
        at_step(patch, 4, fill)
        try:
            # The write of step 4 fails in the background: that of `best`, at the end, may be noticed before.
            what = r"cannot save to .*: File too large; (checkpoints/2 is the newest|best/ has none)"
            with pytest.raises(UserError, match=what):
                toy.train(cfg, tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [2]
    # A run's threads end with its process; here those of the run that stopped may still write.
    seen = None
    while seen != (seen := sorted((tmp_path / "run").rglob("*"))):
        time.sleep(2)
    state, said = toy.train(cfg, tmp_path / "run")
    assert any("resuming at step 2" in line for line in said)
    assert_same(state, whole)
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*")), "what was half-written is gone"


def test_metrics_that_cannot_be_written(tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1])))
        try:
            with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):
                toy.train(config(), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_to(tmp_path):
    stopped_at(4, config(), tmp_path / "run")
    (tmp_path / "run").chmod(0o555)
    (tmp_path / "run" / "lock").chmod(0o444)
    for workdir in (tmp_path / "run", tmp_path / "run" / "other"):
        with pytest.raises(UserError, match=r"cannot write to .*: Permission denied; a writable"):
            toy.train(config(), workdir)
    (tmp_path / "run").chmod(0o755)


def test_a_place_where_nobody_can_make_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*: Not a directory; a writable --workdir"):
        toy.train(config(), tmp_path / "file" / "run")


def test_a_second_start_is_refused(undisturbed, tmp_path, monkeypatch):
    """While the first goes on, and whatever it has done so far; the lock of a process that is gone says nothing."""
    seen = []

    def second():
        with pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on .*; wait until it ends"):
            loop.train(config(), tmp_path / "run", dataset=toy.dataset(), say=seen.append)

    at_step(monkeypatch, 3, second)
    state, _ = toy.train(config(), tmp_path / "run")
    assert not seen
    assert_same(state, undisturbed)
    with held(tmp_path / "run" / "lock", "it"):
        pass


def test_a_record_file_that_is_cut_off_while_it_is_read(fake_records, tmp_path, monkeypatch):
    records = shutil.copytree(fake_records, tmp_path / "records")
    (shard,) = records.glob("ombria/*/*train*record*")
    content = shard.read_bytes()
    recipe = recipes.find("ombria_s1")
    experiment = dataclasses.replace(recipe.experiment, network=FCN(width=0.0625, stages=1), method=Supervised())
    experiment = dataclasses.replace(experiment, batch_size=8, steps=STEPS)
    execution = dataclasses.replace(
        config().execution, data_dir=str(records), prefetch=0, evaluate_every=STEPS, checkpoint_every=2
    )
    cfg = dataclasses.replace(recipe, experiment=experiment, execution=execution)
    whole, _ = toy.train(cfg, tmp_path / "whole", dataset=None)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.truncate(shard, len(content) // 2))
        with pytest.raises(UserError, match=rf"{shard.name} is damaged .*: build the data set again"):
            toy.train(cfg, tmp_path / "run", dataset=None)
    shard.write_bytes(content)
    state, said = toy.train(cfg, tmp_path / "run", dataset=None)
    assert any("resuming at step 2" in line for line in said)
    assert_same(state, whole)


def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path):
    cfg = config()
    experiment = dataclasses.replace(cfg.experiment, method=toy.Toy(explode_at=2))
    state, _ = toy.train(dataclasses.replace(cfg, experiment=experiment), tmp_path)
    assert (int(state.step), int(state.skipped), int(state.bad_in_a_row)) == (STEPS, 1, 0)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))
