"""Writing and checking files: under a temporary name and then in one move, so that nobody sees half a file."""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from sarjax.errors import UserError


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes `path` in one move; UserError, naming it, where that is not allowed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; a writable folder is needed.") from e
    finally:
        if temporary.exists():
            temporary.unlink()


def file_digest(path: Path) -> tuple[int, str]:
    """(size in bytes, sha256) of a file."""
    with path.open("rb") as f:
        return path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()


def lock(handle: int, otherwise: str) -> bool:
    """Keeps the lock of an open file for this process, until the file is closed or the process ends, however it does.

    Whether there is a lock: not every file system has them. UserError(otherwise) where another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(otherwise) from e
    except OSError:
        return False
    return True


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """The lock of the file `path`, which is made where it is not there, stays, and says who had it last.

    UserError, "`what` is in use by ...", where another process has it; or where the file cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise UserError(f"cannot write to {path.parent}: {e.strerror}; a writable folder would be accepted.") from e
    try:
        who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        lock(handle, f"{what} is in use by {who}; wait until it ends, or stop it.")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def check_is_local(path: str | os.PathLike, instead: str) -> None:
    """UserError that says what to do `instead` where `path` is an address, such as gs://bucket/folder."""
    # As a path it has lost a slash, and would name a folder below the current one.
    if re.match(r"[a-z][a-z0-9]+:/", os.fspath(path)):
        raise UserError(f"{os.fspath(path)} is an address, not a folder of this machine: {instead}.")
