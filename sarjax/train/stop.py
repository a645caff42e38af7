"""Being stopped: what SIGTERM means to a run that is under way."""

import contextlib
import signal
from typing import Any

import jax

from sarjax.train.checkpoint import Checkpoints


class StopFlag:
    """SIGTERM as a question that the loop asks after each step, agreed on by all processes.

    With several processes jax's own notifier listens, and a handler of ours would take the signal from it.
    obeyed: set by the loop when it stops early. On exit the handler that was there before is back, and where it is a
    function it gets the signal that nothing obeyed: one that came too late to stop this run, or when it failed, is
    meant for what follows.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints, self._seen, self._old = checkpoints, False, None
        self.obeyed = False

    def __enter__(self) -> "StopFlag":
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # outside the main thread nobody can send it a signal
                self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self._seen = True

    def requested(self, step: int) -> bool:
        return self._seen if jax.process_count() == 1 else self._checkpoints.reached_preemption(step)

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self._old is None:
            return
        signal.signal(signal.SIGTERM, self._old)
        if self._seen and (error or not self.obeyed) and callable(self._old):
            signal.raise_signal(signal.SIGTERM)
