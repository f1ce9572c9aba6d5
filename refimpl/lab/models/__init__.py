"""Models to experiment on: SmolLM2 and other language models, small ones that ship with the book, classifiers.

Example:
    >>> from refimpl.lab import models
    >>> model, tokenizer = models.load("llama-small")
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """The names of `refimpl.lab.models.language`, which is imported when one is asked for: transformers takes seconds."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("refimpl.lab.models.language"), name)
