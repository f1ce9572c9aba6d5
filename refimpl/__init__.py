"""refimpl: small tested implementations of papers that make neural networks smaller.

The five names most people need:

    from refimpl import compress, GPTQ, EoRA, save, load
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from refimpl.baselines import GPTQ, RTN, ActSVD, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress import Plan, Report, compress, plan
from refimpl.core.io import load, save
from refimpl.lowrank import EoRA

if TYPE_CHECKING:
    from refimpl.baselines.adaround import AdaRound
    from refimpl.methods import METHODS
    from refimpl.quantization import AdaQuant

__version__ = "0.1.0"

__all__ = [
    "GPTQ", "METHODS", "RTN", "ActSVD", "AdaQuant", "AdaRound", "EoRA", "LoftQ", "Magnitude", "Plan", "PlainSVD",
    "QuantizeActivations", "Report", "SparseGPT", "Wanda", "compress", "load", "plan", "save",
]  # fmt: skip

# Methods that train bring the training loop, whose imports take a second: loaded when first asked for.
_LATER = {"AdaQuant": "quantization", "AdaRound": "baselines.adaround", "METHODS": "methods"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"refimpl.{_LATER[name]}"), name)
