"""SIGTERM as an exception, for what is not a training loop: a loop listens itself (`sarjax.train.stop`)."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """SIGTERM came, or ended a training: nothing that catches errors should hold it up."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM raises `Stopped`, between runs: during one the training loop listens itself, and hands it on if late."""

    def stop(*_: Any) -> None:
        raise Stopped

    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(ValueError):  # outside the main thread nobody can send it a signal
            signal.signal(signal.SIGTERM, stop)
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
