"""Where a run's numbers go."""

import subprocess
import sys

import pytest


def test_tensorboard_loads_no_torch(tmp_path):
    """tensorboardX loads it where it is installed, which takes a second and a half of every start."""
    pytest.importorskip("torch")
    code = """
import sys
from sarjax.train.loggers import TensorBoard

board = TensorBoard(sys.argv[1], 0)
board.write(1, {"loss": 1.5})
board.close()
print([name for name in sys.modules if name.split(".")[0] == "torch"])
import torch
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    (events,) = tmp_path.iterdir()
    assert b"loss" in events.read_bytes()
