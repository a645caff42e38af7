"""Writing and checking files: under a temporary name and then in one move, so that nobody sees half a file."""

import hashlib
import os
import re
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


def check_is_local(path: str | os.PathLike, instead: str) -> None:
    """UserError that says what to do `instead` where `path` is an address, such as gs://bucket/folder."""
    # As a path it has lost a slash, and would name a folder below the current one.
    if re.match(r"[a-z][a-z0-9]+:/", os.fspath(path)):
        raise UserError(f"{os.fspath(path)} is an address, not a folder of this machine: {instead}.")
