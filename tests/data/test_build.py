"""Building: all or nothing, the same to the byte, and clear about what it refuses."""

import os
import signal
import subprocess
import sys

import fake_data
import pytest

from sarjax.data import build as building
from sarjax.data.build import build
from sarjax.data.store import find, open_dataset, open_directory
from sarjax.errors import UserError

KILLED = """
import os, signal, sys
from sarjax.data.build import build
kill = lambda stage, done, total: os.kill(os.getpid(), signal.SIGKILL) if stage == {stage!r} else None
build("ombria", sys.argv[1], sys.argv[2], progress=kill)
"""


def test_tfds_reads_it(ombria):
    import tensorflow_datasets as tfds

    _, dataset = ombria
    assert dataset.directory.parts[-2:] == ("ombria", "1.0.0")
    source = tfds.builder_from_directory(os.fspath(dataset.directory)).as_data_source("test")
    assert [example["name"] for example in source] == [b"test/0013", b"test/0018"]


def test_the_same_files_give_the_same_bytes_in_another_process(tmp_path, ombria_source):
    first = build("ombria", ombria_source, tmp_path / "a")
    # Another process: protocol buffers are ordered by addresses unless told otherwise.
    command = (
        f"import sys; from sarjax.data.build import build; build('ombria', {os.fspath(ombria_source)!r}, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", command, tmp_path / "b"], check=True)
    second = find("ombria", data_dir=tmp_path / "b")
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert open_directory(first).fingerprint == open_directory(second).fingerprint


def test_other_files_give_another_fingerprint(tmp_path, ombria_source):
    first = open_directory(build("ombria", ombria_source, tmp_path / "a")).fingerprint
    fake_data.write_ombria(ombria_source, train=("0001",), test=(), seed=1)
    assert open_directory(build("ombria", ombria_source, tmp_path / "b")).fingerprint != first


def test_a_finished_build_is_left_alone_unless_told(tmp_path, ombria_source):
    said = []
    out = tmp_path / "out"
    path = build("ombria", ombria_source, out)
    before = (path / "stats.json").stat().st_ino
    fake_data.write_ombria(ombria_source, train=("0005",), test=())
    assert build("ombria", ombria_source, out, say=said.append) == path
    assert (path / "stats.json").stat().st_ino == before
    assert "is built already: --overwrite builds it again" in said[0]
    build("ombria", ombria_source, out, overwrite=True)
    assert open_directory(path).statistics.tiles == {"train": 3, "val": 1, "test": 1}
    assert os.listdir(out) == ["ombria"]


@pytest.mark.parametrize("stage", ["val", "statistics"])
def test_an_error_midway_leaves_nothing(tmp_path, ombria_source, stage):
    def stop(at, done, total):
        if at == stage:
            raise RuntimeError("power cut")

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="power cut"):
        build("ombria", ombria_source, out, progress=stop)
    assert os.listdir(out) == []
    assert len(open_directory(build("ombria", ombria_source, out)).split("train")) == 2


def test_a_failed_overwrite_keeps_what_was_there(tmp_path, ombria_source):
    out = tmp_path / "out"
    path = build("ombria", ombria_source, out)
    (ombria_source / "OmbriaS1/test/MASK/S1_mask_0013.png").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        build("ombria", ombria_source, out, overwrite=True)
    assert len(open_directory(path).split("test")) == 1


@pytest.mark.parametrize("stage", ["test", "statistics"])
def test_a_killed_build_can_be_run_again(tmp_path, ombria_source, stage):
    out = tmp_path / "out"
    script = KILLED.format(stage=stage)
    result = subprocess.run([sys.executable, "-c", script, ombria_source, out], check=False)
    assert result.returncode == -signal.SIGKILL
    assert os.listdir(out) == [".building-ombria"]
    with pytest.raises(UserError, match="where there is nothing"):
        open_dataset("ombria", data_dir=out)
    # What the killed build had finished is not taken for the new one's.
    fake_data.write_ombria(ombria_source, train=("0005",), test=())
    path = build("ombria", ombria_source, out)
    assert os.listdir(out) == ["ombria"]
    assert len(open_directory(path).split("train")) == 3


def test_one_build_at_a_time(tmp_path, ombria_source):
    def second(stage, done, total):
        build("ombria", ombria_source, tmp_path / "out")

    with pytest.raises(UserError, match="another build of ombria is running"):
        build("ombria", ombria_source, tmp_path / "out", progress=second)


def test_shards(tmp_path, ombria_source, monkeypatch):
    from sarjax_datasets import builder

    whole = open_directory(build("ombria", ombria_source, tmp_path / "a"))
    monkeypatch.setattr(builder, "SHARD_BYTES", 100_000)
    parts = open_directory(build("ombria", ombria_source, tmp_path / "b"))
    assert len(parts.statistics.records) == 4 > len(whole.statistics.records)
    assert parts.split("train").names == whole.split("train").names
    assert parts.statistics.bands == whole.statistics.bands


@pytest.mark.parametrize(
    ("name", "config", "source", "message"),
    [
        ("ombra", "", "source", "unknown data set 'ombra': did you mean 'ombria'"),
        ("zzz", "", "source", "unknown data set 'zzz': known: ombria, whu_opt_sar"),
        ("whu_opt_sar", "scenes", "source", "unknown configuration of whu_opt_sar 'scenes': did you mean 'scene'"),
        ("ombria", "x", "source", "unknown configuration of ombria 'x': known: none"),
        ("ombria", "", "gone", "gone is not a folder: --source takes"),
        ("ombria", "", "empty", "empty is empty: --source takes"),
    ],
)
def test_bad_arguments(tmp_path, ombria_source, name, config, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        build(name, tmp_path / source, tmp_path / "out", config)


def test_an_out_that_cannot_be_written_to(tmp_path, ombria_source):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file: .*--out takes a folder that may be written to"):
        build("ombria", ombria_source, tmp_path / "file")


def test_where_records_go_by_default(tmp_path, ombria_source, monkeypatch):
    monkeypatch.setenv("SARJAX_DATA_DIR", os.fspath(tmp_path / "home"))
    assert build("ombria", ombria_source) == tmp_path / "home" / "ombria" / "1.0.0"
    assert len(open_dataset("ombria").split("test")) == 1


def test_progress_without_a_terminal(capsys):
    with building.console_progress("build x") as progress:
        for done in range(101):
            progress("train", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "build x train: 10/100"
    assert len(lines) == 11 - 1
