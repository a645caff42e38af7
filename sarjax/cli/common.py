"""What every verb needs: output, devices, and how a function becomes a verb. Loads no jax until it has to."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from sarjax.errors import UserError, unknown
from sarjax.machine import visible_cores
from sarjax.signals import Stopped, termination_raises

Verb = Callable[[Sequence[str]], None]


def note(text: str) -> None:
    """Progress and notices go to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def devices(host_devices: int = 0) -> None:
    """Sets the number of CPU devices (0 = one per core); has to come before anything else asks jax for devices."""
    import logging

    import jax

    logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoint library warns of what is meant
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Where JAX_COMPILATION_CACHE_DIR names a folder: all programs, not those alone that took a second each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_num_cpu_devices", host_devices or visible_cores())


def size_of(text: str) -> tuple[int, int]:
    """(width, height) from --size WxH."""
    try:
        width, height = (int(n) for n in text.lower().split("x"))
    except ValueError as e:
        raise UserError(f"--size is {text!r}; WxH in pixels, such as 1024x1024, is accepted.") from e
    return width, height


@contextlib.contextmanager
def stoppable(then: str = "the same command goes on from there") -> Iterator[None]:
    """SIGTERM ends the block like an interruption, so that it cleans up, and the process with exit code 143."""
    try:
        with termination_raises():
            yield
    except Stopped:
        note(f"sarjax: stopped by signal; {then}")
        sys.exit(143)


def command(name: str, function: Callable[..., None]) -> Verb:
    def call(args: Sequence[str]) -> None:
        tyro.cli(function, prog=f"sarjax {name}", args=args)

    call.__doc__ = function.__doc__
    return call


def dispatch(prog: str, verbs: dict[str, Verb], args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {prog} <verb> [...]\n")
        for name, verb in verbs.items():
            print(f"  {name:<12} {(verb.__doc__ or '').strip().splitlines()[0]}")
        print(f"\n`{prog} <verb> --help` says more.")
        return
    if args[0] == "--version":
        from sarjax import __version__

        print(__version__)
        return
    if args[0] not in verbs:
        raise unknown(f"verb of {prog}", args[0], verbs)
    verbs[args[0]](args[1:])
