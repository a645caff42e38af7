"""Huge pages are asked for once, where they are given to those who ask."""

import os
import sys
from pathlib import Path

import pytest

from sarjax import __main__ as entry
from sarjax import cli, machine

MADVISE = "always [madvise] never\n"


@pytest.fixture
def started(monkeypatch):
    """What was started anew: [(program, arguments, environment)]."""
    found = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "sarjax", "train", "x"])
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(Path, "read_text", lambda path, **_: MADVISE)
    monkeypatch.setattr(os, "execve", lambda *how: found.append(how))
    return found


def test_the_same_command_is_started_with_huge_pages(started):
    machine.ask_for_huge_pages()
    ((program, arguments, environment),) = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == ["-P", "sarjax", "train", "x"]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert environment.items() >= dict(os.environ).items()


@pytest.mark.parametrize("where", ["macOS", "musl", "given always", "never", "no kernel setting", "set by the user"])
def test_elsewhere_nothing_happens(started, monkeypatch, where):
    def missing(path, **_):
        raise FileNotFoundError(path)

    if where == "macOS":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif where == "musl":
        monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    elif where == "set by the user":  # as it is after the new start
        monkeypatch.setenv("GLIBC_TUNABLES", "")
    else:
        said = {"given always": "[always] madvise never\n", "never": "always madvise [never]\n"}.get(where)
        monkeypatch.setattr(Path, "read_text", (lambda path, **_: said) if said else missing)
    machine.ask_for_huge_pages()
    assert started == []


@pytest.mark.parametrize(("verb", "asks"), [("train", True), ("bench", True), ("recipes", False), ("--help", False)])
def test_only_verbs_that_compute_ask(started, monkeypatch, verb, asks):
    monkeypatch.setattr(sys, "argv", ["sarjax", verb])
    monkeypatch.setattr(cli, "main", lambda: None)
    entry.main()
    assert bool(started) == asks
