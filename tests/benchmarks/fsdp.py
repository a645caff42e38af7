"""What a step sends, against the least possible: `python tests/benchmarks/fsdp.py [--width W] [--stages N]`.

An FCN on ResNet-18 learns from tiles of 32 x 32 pixels by AdamW with a running mean, compiled for meshes of eight host
devices and not run. One JSON line: per mesh (data x fsdp) what one device sends in a step, in rings, the least that
gathering each cut parameter once, reducing and scattering its gradient and summing the parts would send, their ratio,
how many bytes are gathered of how many that are cut, what else is moved (nothing should be), and a device's memory.
Host devices have no reduce-scatter: with fsdp above 1 the ratio is up to 1.5 for this reason alone.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import jax

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))


def measure(width, stages, shape):
    import toy

    from sarjax import config
    from sarjax.train.mesh import make_mesh
    from sarjax.train.plan import least_sent
    from sarjax.train.program import compile_step, device_bytes, part

    experiment = toy.config(
        network=toy.FCN(width=width, stages=stages), optimizer=config.Optimizer(name="adamw", ema=0.99)
    ).experiment
    program = compile_step(experiment, toy.dataset(), make_mesh(config.Mesh(*shape)))
    found = program.collectives()
    params = jax.tree.leaves(program.state.params)
    by = {purpose: [one for one in found if program.purpose(one) == purpose] for purpose in ("parameters", "rows")}
    sent, least = sum(one.sent for one in found), least_sent(program.state, program.sizes)
    return {
        "mesh": "x".join(map(str, shape)),
        "sent_bytes": round(sent),
        "least_bytes": least,
        "times_least": round(sent / least, 4),
        "gathered_bytes": sum(one.times * one.size for one in by["parameters"]),
        "cut_bytes": sum(4 * x.size for x in params if part(x) != x.shape),
        "moved_otherwise_bytes": sum(one.times * one.size for one in by["rows"]),
        "state_bytes": device_bytes(program.state),
        "peak_bytes": program.peak,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=4.0)
    parser.add_argument("--stages", type=int, default=1, choices=(1, 2, 3, 4))
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    machine = {"jax": jax.__version__, "python": platform.python_version(), "processor": platform.machine()}
    print(
        json.dumps(vars(asked) | {"meshes": [measure(asked.width, asked.stages, shape) for shape in MESHES]} | machine)
    )
