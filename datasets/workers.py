"""Rows of tiles encoded by many processes, handed back in order.

What a worker makes goes through a file beside the records, and only its name through the pipe: a worker that dies while
it sends (out of memory, say) would leave the reader waiting for the rest. No worker outlives the build, whichever way
that ends: they all watch a pipe whose other end the build alone holds.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from sarjax_datasets.rows import Encoder, Row

from sarjax.data.layout import Layout
from sarjax.errors import UserError

_LENGTH = struct.Struct("<Q")
_encoder: Encoder | None = None


def encode(layout: Layout, compression: str, rows: Iterable[Row], jobs: int, folder: Path) -> Iterator[list[bytes]]:
    """The records of each of `rows`, in order. jobs: processes (1 = this one). folder: for files in passing.

    Raises what a worker raises, and UserError where one is killed.
    """
    if jobs == 1:
        yield from map(Encoder(layout, compression), rows)
        return
    # Workers need what a row is read by, not the list of all scenes.
    layout = dataclasses.replace(layout, scenes=(), splits={}, problems=())
    rows = iter(rows)
    with _pool(layout, compression, jobs) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        numbers = itertools.count()

        def submit() -> None:
            for row in itertools.islice(rows, 1):
                with _interrupts_held():
                    waiting.append(pool.submit(_work, row, folder / f"row-{next(numbers)}.part"))

        try:
            for _ in range(jobs + 2):  # so that a worker never waits for the writing of another's row
                submit()
            while waiting:
                path = waiting.popleft().result()
                submit()
                records = _unpack(path)
                path.unlink()
                yield records
        except concurrent.futures.process.BrokenProcessPool as e:
            raise UserError(
                "a worker process ended before its work was done, killed perhaps for want of memory: fewer --jobs, or "
                "--jobs 1, would be accepted."
            ) from e


@contextlib.contextmanager
def _pool(layout: Layout, compression: str, jobs: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """`jobs` workers, which end at once where the block ends by an exception or this process does."""
    ours, theirs = multiprocessing.Pipe(duplex=False)[::-1]
    context = multiprocessing.get_context("spawn")  # JAX, whose threads may run here, does not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (layout, compression, theirs))
    try:
        yield pool
        pool.shutdown()
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        theirs.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C is for the build, after the block; a worker that starts inside never hears it, from its first line on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(layout: Layout, compression: str, end: Connection) -> None:
    """In a worker, which ends with the build."""
    global _encoder
    threading.Thread(target=_end_with, args=(end,), daemon=True).start()
    _encoder = Encoder(layout, compression)


def _end_with(end: Connection) -> None:
    try:
        end.recv_bytes()
    finally:
        os._exit(1)


def _work(row: Row, path: Path) -> Path:
    records = _encoder(row)
    path.write_bytes(b"".join(part for r in records for part in (_LENGTH.pack(len(r)), r)))
    return path


def _unpack(path: Path) -> list[bytes]:
    data, records, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        records.append(data[at : at + length])
        at += length
    return records
