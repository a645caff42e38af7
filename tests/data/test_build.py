"""Building: all or nothing, the same to the byte, and clear about what it refuses."""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import fake_data
import numpy as np
import pytest
from fake_data import contents
from fake_folder import OWN, write_own

from sarjax.data import build as building
from sarjax.data.build import build
from sarjax.data.layout import Options
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
    assert build("ombria", ombria_source, out, say=said.append) == path
    assert "is built already: --overwrite builds it again" in said[0]
    fake_data.write_ombria(ombria_source, train=("0005",), test=())
    with pytest.raises(UserError, match=r"holds other records .*\(1 scene more\): --overwrite builds it again"):
        build("ombria", ombria_source, out)
    assert (path / "stats.json").stat().st_ino == before
    build("ombria", ombria_source, out, overwrite=True)
    assert open_directory(path).statistics.tiles == {"train": 3, "val": 1, "test": 1}
    assert os.listdir(out) == ["ombria"]


def test_what_was_built_from_something_else_is_refused(tmp_path):
    source, out = tmp_path / "s", tmp_path / "o"
    write_own(source, ["a", "b", "c", "d"])
    (source / "split").mkdir()
    (source / "split/train.txt").write_text("a\nb\nc")
    description = tmp_path / "other.toml"
    path = build("paired_folder", source, out)
    made = contents(path)

    def again(text=OWN, exclude=()):
        description.write_text(text)
        return build("paired_folder", source, out, options=Options(exclude, description))

    assert again() == path
    assert again(exclude=("d.tif",)) == path  # it was in no split, so the records are the same
    exchanged = OWN.replace("value = 1", "value = 2").replace("[0, 7]", "[0, 1]").replace("value = 2", "value = 7")
    for arguments, change in (
        ({"text": exchanged}, "other meanings of the label values 1, 7"),
        ({"text": OWN.replace("tile = 64", "tile = 32")}, "tile is 32, not 64"),
        ({"text": OWN.replace("tile = 64", "tile = 64\ncover = true")}, "cover is true, not false"),
        ({"exclude": ("b.tif", "c")}, "2 scenes fewer; excluded: b, c; before: none"),
        ({"text": OWN + '[split]\ntrain = "other.txt"\nval = "val.txt"'}, "other splits of the same scenes"),
        ({"text": OWN + '[split]\ntrain = "moved.txt"'}, "other scenes"),
        ({"text": OWN.replace("[sar]", '[sar]\nfolder = "again"')}, "other files of the same scenes"),
    ):
        (source / "other.txt").write_text("a\nb")
        (source / "val.txt").write_text("c")
        (source / "moved.txt").write_text("a\nb\nd")
        shutil.copytree(source / "sar", source / "again", dirs_exist_ok=True)
        with pytest.raises(UserError, match=f"holds other records than would be built now .{change}.: --overwrite"):
            again(**arguments)
    (path / "layout.json").write_text("[1]")
    with pytest.raises(UserError, match=r"its layout\.json cannot be read"):
        again()
    (path / "layout.json").unlink()  # as builds were before
    assert again(exchanged) == path
    with pytest.raises(UserError, match="other bands, classes"):
        again(OWN.replace("intensity", "amplitude"))
    build("paired_folder", source, out, overwrite=True)
    assert contents(path) == made


def test_each_compression_holds_the_same(tmp_path, ombria_source):
    found = {}
    for name in ("zlib", "zstd", "none"):
        made = open_directory(build("ombria", ombria_source, tmp_path / name, compression=name))
        records = sum(p.stat().st_size for p in made.directory.glob("*.array_record*"))
        found[name] = records, made.fingerprint, list(made.split("train"))
    sizes, fingerprints, tiles = zip(*found.values(), strict=True)
    assert sizes[0] <= sizes[1] < sizes[2]  # files end at a multiple of 64 kB
    assert len(set(fingerprints)) == 3
    for i, tile in enumerate(tiles[0]):
        for other in tiles[1:]:
            assert tile.keys() == other[i].keys()
            for key in tile:
                np.testing.assert_array_equal(other[i][key], tile[key])
    with pytest.raises(UserError, match=r"holds other records .*\(compression is zstd, not zlib\): --overwrite"):
        build("ombria", ombria_source, tmp_path / "zlib")
    with pytest.raises(UserError, match="unknown compression 'zst': did you mean 'zstd'"):
        build("ombria", ombria_source, tmp_path / "zlib", compression="zst")


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("method", ["write", "close"])
def test_a_full_disk(tmp_path, ombria_source, monkeypatch, jobs, method):
    from sarjax_datasets import builder

    class Full:
        def __init__(self, path, options):
            self.write = self.close = lambda *record: None
            setattr(self, method, self.full)

        def full(self, *record):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 0")

    monkeypatch.setattr(builder, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"cannot write records to .*out, where no room is left: free some, or"):
        build("ombria", ombria_source, tmp_path / "out", jobs=jobs)
    assert os.listdir(tmp_path / "out") == []
    assert multiprocessing.active_children() == []


def test_what_fails_first_is_what_is_said(tmp_path, ombria_source, monkeypatch):
    """A worker finds the disk full; the writer, which is closed for it, does too."""
    from sarjax_datasets import builder, workers

    def encode(*arguments):
        yield from itertools.islice(encoded(*arguments), 1)
        raise PermissionError(errno.EACCES, "Permission denied")

    class Full(builder.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("open() failed: Input/output error")

    encoded = workers.encode
    monkeypatch.setattr(workers, "encode", encode)
    monkeypatch.setattr(builder, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"cannot write records to .*: Permission denied\."):
        build("ombria", ombria_source, tmp_path / "out")


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
        ("zzz", "", "source", "unknown data set 'zzz': known: bitemporal, ombria, paired_folder, whu_opt_sar"),
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
