"""The examples in the docstrings of what computes numbers run."""

import doctest
import importlib
import pkgutil

import pytest

import sarjax.evaluate
import sarjax.losses

MODULES = sorted(
    info.name
    for package in (sarjax.losses, sarjax.evaluate)
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert any(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES)
