"""Work in a process of its own: on cores of its own, or as a process does it only once."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from sarjax.errors import UserError
from sarjax.machine import visible_cores


class Apart:
    """A function that is made, and called, in a new process; to be closed, as by `with`.

    make: (*arguments) -> the function, both of which a pickle can hold; what the function gives comes back.
    cores: how many this process and its own may use, the first of those there are; 0 = all. They hold where the system
    has affinities, as Linux.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any, cores: int = 0):
        context = multiprocessing.get_context("spawn")  # JAX, whose threads may run here, does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cores, make, arguments))
        self._process.start()
        theirs.close()

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function and waits; UserError where it raises one, or its process has ended."""
        try:
            self._pipe.send(arguments)
            found = self._pipe.recv()
        except (EOFError, OSError) as e:
            self._process.join()
            raise UserError(
                f"a process that measures ended with exit code {self._process.exitcode}; what it said is above, and a "
                "smaller size, or a machine with more memory, may do."
            ) from e
        if isinstance(found, UserError):
            raise found
        return found

    def close(self) -> None:
        """Ends the process; returns when it is gone."""
        self._pipe.close()  # it takes that for the end
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def first_cores(count: int) -> int:
    """How many cores a process with `cores=count` has: as many as it is told where it can be, else all."""
    return min(count, visible_cores()) if count and hasattr(os, "sched_setaffinity") else visible_cores()


def _serve(pipe: Connection, cores: int, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):  # before there are threads: those that come inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share an accelerator
    function = None
    with contextlib.suppress(EOFError):
        while True:
            asked = pipe.recv()
            try:
                function = function or make(*arguments)
                found = function(*asked)
            except UserError as e:
                found = e
            pipe.send(found)
