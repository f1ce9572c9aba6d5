"""Every example in a public docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import refimpl

MODULES = [
    info.name
    for info in pkgutil.walk_packages(refimpl.__path__, "refimpl.")
    if not info.name.endswith(".__main__") and not info.name.startswith("refimpl.studies.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
