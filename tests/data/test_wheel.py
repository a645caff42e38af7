"""The wheel holds every builder with its text files: folders are found, not listed."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sarjax.data.build import builders

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel that is built from a copy, so that nothing is left in the project."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("sarjax", "datasets"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work / "out", work]
    if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        command.append("--no-build-isolation")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("setuptools here is older than 77, which does not know our licence field, and none can be fetched")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (work / "out").iterdir()
    return set(zipfile.ZipFile(path).namelist())


def test_every_builder_is_in_the_wheel(wheel):
    for name in builders():
        assert f"sarjax_datasets/{name}/{name}_dataset_builder.py" in wheel
    for path in (ROOT / "datasets").rglob("*"):
        if path.suffix in (".py", ".txt", ".md", ".bib"):
            assert f"sarjax_datasets/{path.relative_to(ROOT / 'datasets').as_posix()}" in wheel


def test_nothing_else_is_called_datasets(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sarjax", "sarjax_datasets"}
    assert "sarjax/py.typed" in wheel
