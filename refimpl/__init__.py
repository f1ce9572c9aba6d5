"""refimpl: small tested implementations of papers that make neural networks smaller.

The five names most people need:

    from refimpl import compress, GPTQ, EoRA, save, load
"""

from refimpl.baselines import GPTQ, RTN, ActSVD, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda
from refimpl.core.compress import Plan, Report, compress, plan
from refimpl.core.io import load, save
from refimpl.lowrank import EoRA

__version__ = "0.1.0"

METHODS = {
    method.__name__: method
    for method in (RTN, GPTQ, Magnitude, Wanda, SparseGPT, PlainSVD, ActSVD, LoftQ, EoRA)
}

__all__ = [
    "GPTQ", "METHODS", "RTN", "ActSVD", "EoRA", "LoftQ", "Magnitude", "Plan", "PlainSVD", "Report", "SparseGPT",
    "Wanda", "compress", "load", "plan", "save",
]  # fmt: skip
