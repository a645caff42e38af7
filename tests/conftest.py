"""Shared fixtures: eight host devices, a persistent compilation cache, and the folders that lie beside the project."""

import json
import os
from pathlib import Path

# Tests compile much and compute little: the time goes to LLVM.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import fake_bitemporal
import fake_data
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


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """A module's programs are of no use to the next; kept, they come to gigabytes."""
    yield
    jax.clear_caches()


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


@pytest.fixture(scope="module")
def session_devices():
    """The eight devices of the session stay; a verb would ask for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sarjax.cli.common.devices", lambda host_devices=0: None)
        yield


@pytest.fixture(scope="session")
def fake_records(tmp_path_factory) -> Path:
    """OMBRIA, WHU-OPT-SAR and LEVIR-CD built from fake files; the folder's name holds what paths stumble over."""
    from sarjax import recipes
    from sarjax.data.build import build

    root = tmp_path_factory.mktemp("füße und spaces")
    fake_data.write_ombria(root / "ombria source")
    fake_data.write_whu(root / "whu source")
    fake_bitemporal.write_set(root / "bitemporal source")
    asked = {find().experiment.data for find in recipes.RECIPES.values()}
    for name, config in sorted((data.name, data.config) for data in asked):
        build(name, root / f"{name.removesuffix('_opt_sar')} source", root / "records", config)
    return root / "records"
