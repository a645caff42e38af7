"""Data sets built once from fake files, for the tests that only read."""

from pathlib import Path

import fake_data
import pytest

from sarjax.data.build import build
from sarjax.data.store import open_directory


@pytest.fixture(scope="session")
def ombria(tmp_path_factory):
    """(what the files hold, the built data set); the folder's name has a space and a letter beyond ASCII."""
    root = tmp_path_factory.mktemp("überflutung und mehr")
    tiles = fake_data.write_ombria(root / "source")
    return tiles, open_directory(build("ombria", root / "source", root / "out"))


@pytest.fixture(scope="session")
def whu(tmp_path_factory):
    root = tmp_path_factory.mktemp("whu")
    scenes = fake_data.write_whu(root / "source")
    return scenes, open_directory(build("whu_opt_sar", root / "source", root / "out"))


@pytest.fixture
def ombria_source(tmp_path) -> Path:
    """A small source of ombria that a test may damage."""
    fake_data.write_ombria(tmp_path / "source", train=("0001", "0002", "0003"), test=("0013",))
    return tmp_path / "source"
