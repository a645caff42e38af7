"""Reading records: random access, only what is asked for, from many threads, and without heavy imports."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sarjax.data.build import build
from sarjax.data.store import available, data_root, open_dataset, open_directory
from sarjax.errors import UserError


def test_arrays_and_shapes(ombria):
    _, dataset = ombria
    tile = dataset.split("train")[0]
    shapes = {key: (value.shape, value.dtype.name) for key, value in tile.items()}
    assert shapes == {
        "id": ((), "int32"),
        "sar": ((2, 256, 256, 1), "uint8"),
        "sar_valid": ((2, 256, 256), "uint8"),
        "optical": ((2, 256, 256, 3), "uint8"),
        "optical_valid": ((2, 256, 256), "uint8"),
        "label": ((256, 256), "uint8"),
    }
    assert dataset.split("train").keys == tuple(shapes)
    assert dataset.splits == ("train", "val", "test")


def test_some_modalities_without_decoding_the_others(ombria_source, tmp_path, monkeypatch):
    import zlib

    dataset = open_directory(build("ombria", ombria_source, tmp_path / "out", compression="zlib"))
    split = dataset.split("train", modalities=("sar",))
    whole = dataset.split("train")[1]
    decoded = []
    real = zlib.decompress
    monkeypatch.setattr(zlib, "decompress", lambda data, *a: decoded.append(len(out := real(data, *a))) or out)
    tile = split[1]
    assert split.keys == tuple(tile) == ("id", "sar", "sar_valid", "label")
    assert sorted(decoded) == sorted(tile[key].nbytes for key in ("sar", "sar_valid", "label"))
    for key in tile:
        np.testing.assert_array_equal(tile[key], whole[key])


def test_indices(ombria):
    _, dataset = ombria
    split = dataset.split("train")
    assert len(split) == 6
    assert int(split[-1]["id"]) == int(split[np.int64(5)]["id"]) == 19
    assert split.name(-1) == split.names[5] == "train/0019"
    for i in (6, -7):
        with pytest.raises(IndexError, match="split 'train', which has 6"):
            split[i]


def test_threads(ombria):
    _, dataset = ombria
    split = dataset.split("train")
    wanted = [tile["sar"].sum() for tile in split]
    with ThreadPoolExecutor(16) as pool:
        sums = list(pool.map(lambda i: split[i % 6]["sar"].sum(), range(300)))
    assert sums == [wanted[i % 6] for i in range(300)]


def test_what_is_not_there(ombria, tmp_path):
    _, dataset = ombria
    root = dataset.directory.parent.parent
    with pytest.raises(UserError, match="unknown split of ombria 'trian': did you mean 'train'"):
        dataset.split("trian")
    with pytest.raises(UserError, match="unknown modality of ombria 'radar'"):
        dataset.split("train", ("radar",))
    with pytest.raises(
        UserError, match=r"no data set 'whu' in .* where there is ombria: build it with `sarjax data build whu"
    ):
        open_dataset("whu", data_dir=root)
    with pytest.raises(UserError, match=r"no data set 'ombria' \(x\) .*nothing: .* ombria --config x --source DIR"):
        open_dataset("ombria", "x", tmp_path)
    with pytest.raises(UserError, match=r"holds no built data set \(dataset_info.json is missing\)"):
        open_directory(tmp_path)
    copy = shutil.copytree(dataset.directory, tmp_path / "copy")
    next(copy.glob("*test.array*")).unlink()
    with pytest.raises(
        UserError, match=r"ombria-test.array_record-00000-of-00001 is missing: build the data set again"
    ):
        open_directory(copy)


def cut(share):
    return lambda content: content[: int(share * len(content))]


def flip(share):
    """One byte turned over."""

    def damage(content):
        i = int(share * len(content))
        return content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :]

    return damage


RECORDS = "ombria-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (RECORDS, cut(0)),
        (RECORDS, cut(0.5)),
        (RECORDS, cut(0.999)),
        (RECORDS, flip(0.1)),
        (RECORDS, flip(0.5)),
        (RECORDS, flip(0.9)),
        ("dataset_info.json", cut(0)),
        ("dataset_info.json", cut(0.5)),
        ("dataset_info.json", lambda content: b"{}"),
        ("dataset_info.json", lambda content: b"\xff\xfe"),
        ("dataset_info.json", lambda content: content.replace(b'"6"', b'"7"')),
        ("dataset_info.json", lambda content: content.replace(b'"6"', b'"5"')),
        ("features.json", cut(0)),
        ("features.json", cut(0.5)),
        ("features.json", lambda content: b"[]"),
        ("features.json", lambda content: content.replace(b'"sar"', b'"radar"')),
        ("spec.json", lambda content: b"\xff\xfe"),
        ("spec.json", lambda content: b"[]"),
        ("stats.json", cut(0.5)),
        ("stats.json", lambda content: b"[]"),
        ("stats.json", lambda content: content.replace(b'"records"', b'"recs"')),
    ],
)
def test_a_damaged_file_is_named(ombria, tmp_path, name, damage):
    copy = shutil.copytree(ombria[1].directory, tmp_path / "copy")
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(damage(content))
    assert (copy / name).read_bytes() != content
    with pytest.raises(UserError) as e:
        list(open_directory(copy).split("train"))
    message = str(e.value)
    assert name in message
    assert str(copy) in message
    assert message.endswith("build the data set again.")
    assert len(message.splitlines()) == 1


def test_the_damaged_shard_is_named(tmp_path, ombria_source, monkeypatch):
    from sarjax_datasets import builder

    monkeypatch.setattr(builder, "SHARD_BYTES", 100_000)
    directory = build("ombria", ombria_source, tmp_path / "out")
    shards = sorted(directory.glob("*train*"))
    assert len(shards) > 1
    shards[-1].write_bytes(b"")
    split = open_directory(directory).split("train")
    for _ in range(2):
        with pytest.raises(UserError, match=f"{shards[-1].name} is damaged"):
            split[-1]
    with pytest.raises(UserError, match=f"{shards[-1].name} is damaged"):
        split.name(len(split) - 1)


def test_a_damaged_note_of_the_default_configuration(whu, tmp_path):
    root = shutil.copytree(whu[1].directory.parent.parent.parent, tmp_path / "copy")
    (root / "whu_opt_sar" / ".config" / "metadata.json").write_text("{}")
    with pytest.raises(UserError, match=r"metadata.json is damaged \('default_config_name'\)"):
        open_dataset("whu_opt_sar", data_dir=root)


def test_the_default_configuration_and_the_newest_version(whu, ombria, tmp_path):
    _, dataset = whu
    root = dataset.directory.parent.parent.parent
    assert available(root) == ["whu_opt_sar/scene"]
    assert open_dataset("whu_opt_sar", data_dir=root).directory == open_dataset("whu_opt_sar", "scene", root).directory
    for version in ("1.0.0", "1.9.0", "1.10.0", ".1.11.0"):
        shutil.copytree(ombria[1].directory, tmp_path / "ombria" / version)
    assert open_dataset("ombria", data_dir=tmp_path).directory.name == "1.10.0"


@pytest.mark.parametrize("bucket", ["gs://bucket/records", Path("gs://bucket/records"), "s3://bucket"])
def test_a_bucket_is_no_folder(bucket, tmp_path, monkeypatch):
    """It would otherwise be a folder called gs: below the current one."""
    with pytest.raises(UserError, match="copy from a bucket"):
        open_dataset("ombria", data_dir=bucket)
    with pytest.raises(UserError, match="copy from a bucket"):
        build("ombria", tmp_path, bucket)
    monkeypatch.setenv("SARJAX_DATA_DIR", str(bucket))
    with pytest.raises(UserError, match="copy from a bucket"):
        data_root()
    assert data_root(tmp_path / "gs:" / "x") == tmp_path / "gs:" / "x"


def test_the_fingerprint_is_of_the_contents(ombria, tmp_path):
    _, dataset = ombria
    assert open_directory(shutil.copytree(dataset.directory, tmp_path / "elsewhere")).fingerprint == dataset.fingerprint
    assert len(dataset.fingerprint) == 16


def test_reading_needs_no_heavy_library(ombria):
    script = """
import sys
from sarjax.data.store import open_directory
split = open_directory(sys.argv[1]).split("train")
split[0], split.name(0)
print([m for m in ("tensorflow", "rasterio", "jax", "grain", "matplotlib", "sarjax_datasets") if m in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", script, ombria[1].directory], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"


def test_importing_it_is_light():
    script = """
import sys, sarjax.data.store, sarjax.data.statistics, sarjax.data.build, sarjax.data.synthesis, sarjax.reports.sheet
print([m for m in ("tensorflow_datasets", "rasterio", "jax", "grain", "matplotlib", "scipy") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
