"""Shared fixtures: eight host devices, a persistent compilation cache, and the folders that lie beside the project."""

import json
import os
from pathlib import Path

# Tests compile much and compute little: the time goes to LLVM.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import hypothesis
import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# The gate tries the same examples each time; anybody else tries new ones.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("gate")


@pytest.fixture(scope="session")
def oracle():
    """(name) -> (arrays, description) of a numeric fixture made by a public parent implementation."""
    folder = Path(os.environ.get("SARJAX_ORACLES", ROOT / ".." / "shared" / "oracles"))

    def load(name: str):
        if not (folder / f"{name}.json").is_file():
            pytest.skip(f"the numeric fixture {name!r} is not in {folder}: set SARJAX_ORACLES")
        description = json.loads((folder / f"{name}.json").read_text())
        arrays = np.load(folder / f"{name}.npz", allow_pickle=False) if (folder / f"{name}.npz").is_file() else {}
        return arrays, description

    return load


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real imagery; skips where it is absent."""
    folder = Path(os.environ.get("SARJAX_SHARED_DATA", ROOT / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real imagery at {folder}: set SARJAX_SHARED_DATA")
    return folder
