"""The same result on any layout: every method, one device against every other way to lay out the same global batch.

Accumulation is not in the table: all these methods normalise over a batch, so a microbatch is another batch. Where
nothing couples rows it changes nothing (`test_step.test_devices_and_microbatches_change_nothing`). What turns on a last
bit (ReLU at zero, a pool of equals, speckle, rounding of resampled views) is left out of the networks and inputs: see
`layouts`.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from train import layouts
from train.test_faults import free_port

from sarjax.config import Mesh
from sarjax.train.mesh import make_mesh

HERE = Path(__file__).resolve().parent
LAYOUTS = {"8 data-parallel": Mesh(), "4x2 fsdp": Mesh(4, 2), "2x2x2 with space": Mesh(2, 2, 2)}
# After ten steps, of the loss. Pseudo-labels are decisions: a last bit may flip one.
SMOOTH, HARD = 1e-5, 1e-3
TOLERANCE = {"supervised": SMOOTH, "scene_clustering": SMOOTH, "dhfa": SMOOTH, "dllr": HARD, "frd": SMOOTH}
CASES = layouts.cases()


def assert_same(found, wanted, tolerance, what):
    flipped = float((found.answer != wanted.answer).mean())
    apart = np.abs(found.losses / wanted.losses - 1)
    norm = np.linalg.norm(found.gradient - wanted.gradient) / np.linalg.norm(wanted.gradient)
    print(f"{what}: loss {apart[0]:.1e}, after ten steps {apart.max():.1e}; gradient {norm:.1e}; flipped {flipped:.1e}")
    assert np.linalg.norm(wanted.gradient) > 0
    assert apart[0] <= 1e-5
    assert norm <= 1e-4
    assert apart.max() <= tolerance
    # Only where the two likeliest classes are as good as equal.
    assert wanted.sure[found.answer != wanted.answer].max(initial=0.0) < 100 * tolerance


@contextlib.contextmanager
def two_processes(method, folder):
    """(two processes of four devices that train meanwhile) -> a function that waits for what they make of it."""
    port = free_port()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    members = [
        subprocess.Popen(
            [sys.executable, str(HERE / "layouts.py"), *map(str, (folder / "made.npz", method, process, 2, port))],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]

    def result():
        ends = [member.communicate()[1] for member in members]
        assert [member.returncode for member in members] == [0, 0], ends
        with np.load(folder / "made.npz") as made:
            return layouts.Trained(**made)

    try:
        yield result
    finally:
        for member in members:
            member.kill()


@pytest.mark.timeout(1800)  # six programs to compile; of DLLR that takes minutes
@pytest.mark.parametrize("method", CASES)
def test_the_same_on_every_layout(method, tmp_path):
    with two_processes(method, tmp_path) as theirs:
        one = layouts.train(*CASES[method], make_mesh(Mesh(), jax.devices()[:1]))
        for name, mesh in LAYOUTS.items():
            found = layouts.train(*CASES[method], make_mesh(mesh))
            assert_same(found, one, TOLERANCE[method], f"{method}, {name}")
        assert_same(theirs(), one, TOLERANCE[method], f"{method}, 2 processes x 4 devices")


def test_every_method_is_in_the_table():
    from sarjax.methods import METHODS

    assert set(CASES) == set(METHODS) - {"toy"}
