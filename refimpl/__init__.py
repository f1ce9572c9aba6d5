"""refimpl: small tested implementations of papers that make neural networks smaller.

The five names most people need:

    from refimpl import compress, GPTQ, EoRA, save, load
"""

from refimpl.baselines import GPTQ, RTN, ActSVD, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda
from refimpl.core.compress import Plan, Report, compress, plan
from refimpl.core.io import load, save
from refimpl.lowrank import EoRA
from refimpl.methods import METHODS

__version__ = "0.1.0"

__all__ = [
    "GPTQ", "METHODS", "RTN", "ActSVD", "EoRA", "LoftQ", "Magnitude", "Plan", "PlainSVD", "Report", "SparseGPT",
    "Wanda", "compress", "load", "plan", "save",
]  # fmt: skip
