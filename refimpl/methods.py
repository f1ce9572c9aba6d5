"""The methods and the cache policies by name, for command lines and configuration files."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from refimpl.baselines import GPTQ, RTN, ActSVD, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda
from refimpl.baselines.activations import QuantizeActivations
from refimpl.baselines.adaround import AdaRound
from refimpl.baselines.kvcache import H2O, KIVI, Full, SnapKV, StreamingLLM, ThinK
from refimpl.core.cache import Policy
from refimpl.core.compress.method import Method
from refimpl.core.errors import OptionError, nearest
from refimpl.papers import papers


def _of_papers(host: str) -> list[Any]:
    """Exports of the papers with this host, in the book's order."""
    mine = [paper for paper in papers() if paper.host == host]
    return [getattr(import_module(paper.module), name) for paper in mine for name in paper.exports]


#: Baselines, then the papers' own, as papers.toml lists them.
METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        RTN,
        GPTQ,
        AdaRound,
        QuantizeActivations,
        Magnitude,
        Wanda,
        SparseGPT,
        PlainSVD,
        ActSVD,
        LoftQ,
        *_of_papers("compress"),
    )
}

POLICIES: dict[str, type[Policy]] = {
    policy.__name__: policy for policy in (Full, StreamingLLM, H2O, SnapKV, KIVI, ThinK, *_of_papers("cache"))
}


def method_by_name(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and options, which may be strings as a command line has them.

    Args:
        name: a key of `METHODS`, in any case.
        options: hyper-parameters by name; missing ones keep their defaults.

    Raises:
        OptionError: unknown method or option (the nearest is suggested), or a value of another type.

    Example:
        >>> method_by_name("gptq", {"bits": "3", "group_size": "None"})
        GPTQ(bits=3, group_size=None, symmetric=False, act_order=False, damping=0.01)
    """
    names = {known.lower(): known for known in METHODS}
    if name.lower() not in names:
        raise OptionError(f"method={name!r} is unknown; use {nearest(name, METHODS)}")
    kind: Any = METHODS[names[name.lower()]]
    known = {field.name: field for field in fields(kind)}
    values = {}
    for option, text in (options or {}).items():
        if option not in known:
            raise OptionError(f"{option!r} is no option of {kind.__name__}; use {nearest(option, known)}")
        try:
            value = ast.literal_eval(text) if isinstance(text, str) else text
        except (ValueError, SyntaxError):
            value = text  # a plain word, such as the pattern 2:4
        annotation = str(known[option].type)
        wanted: Any = {"int": int, "float": (int, float), "bool": bool, "str": str}[annotation.partition(" |")[0]]
        fits = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool)
        if not (fits or (value is None and "None" in annotation)):
            raise OptionError(f"{option}={text} of {kind.__name__}: expected {annotation}")
        values[option] = value
    return kind(**values)
