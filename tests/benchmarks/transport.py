"""How fast plans are made: `python tests/benchmarks/transport.py [PIXELS ...]` (default 65536 1048576), 8 classes.

Ours (ott-jax), a plain log-domain loop in jax, and POT's log-domain Sinkhorn in numpy, all with the same 50 iterations,
one after the other in each of five rounds, after a warm-up. One JSON line: per size the median and the spread of the
seconds of each, how far its plan is from ours, and the ratios. POT comes with `pip install '.[bench]'`; without it that
column is null.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sarjax.losses.transport import transport

CLASSES, ITERATIONS, ROUNDS, EPSILON = 8, 50, 5, 0.05


@jax.jit
def plain(cost, a, b):
    log_k, log_a, log_b = -cost / EPSILON, jnp.log(a), jnp.log(b)

    def step(_, uv):
        v = log_b - jax.nn.logsumexp(log_k + uv[0][:, None], 0)
        return log_a - jax.nn.logsumexp(log_k + v, 1), v

    u, v = jax.lax.fori_loop(0, ITERATIONS, step, (jnp.zeros_like(a), jnp.zeros_like(b)))
    return jnp.exp(u[:, None] + log_k + v)


def pot(cost, a, b):
    import ot

    return ot.sinkhorn(a, b, cost, EPSILON, method="sinkhorn_log", numItermax=ITERATIONS, stopThr=0, warn=False)


def seconds(function, *arguments):
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began, np.asarray(result)


def measure(pixels):
    r = np.random.default_rng(0)
    cost = r.uniform(0, 1, (pixels, CLASSES)).astype(np.float32)
    a, b = np.full(pixels, 1 / pixels, np.float32), r.dirichlet(np.ones(CLASSES)).astype(np.float32)
    ours = jax.jit(lambda *x: transport(*x, epsilon=EPSILON, iterations=ITERATIONS).matrix)
    on_device, on_host = [jnp.asarray(x) for x in (cost, a, b)], [x.astype(np.float64) for x in (cost, a, b)]
    on_host[2] /= on_host[2].sum()
    sides = {"ours": (ours, on_device), "plain": (plain, on_device)}
    if importlib.util.find_spec("ot"):
        sides["pot"] = (pot, on_host)
    plans = {name: seconds(f, *x)[1] for name, (f, x) in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, (f, x) in sides.items():
            times[name].append(seconds(f, *x)[0])
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "pixels": pixels,
        "seconds": {name: {"median": medians[name], "min": min(t), "max": max(t)} for name, t in times.items()},
        "times_ours": {name: medians[name] / medians["ours"] for name in sides},
        "largest_difference": {
            name: float(np.abs(plan - plans["ours"]).max() / plans["ours"].max()) for name, plan in plans.items()
        },
        "bytes_of_a_pass": pixels * CLASSES * 4,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pixels", nargs="*", type=int, default=[65_536, 1_048_576])
    sizes = [measure(n) for n in parser.parse_args().pixels]
    machine = {"device": str(jax.devices()[0].device_kind), "jax": jax.__version__, "python": platform.python_version()}
    print(json.dumps(machine | {"classes": CLASSES, "iterations": ITERATIONS, "rounds": ROUNDS, "sizes": sizes}))
