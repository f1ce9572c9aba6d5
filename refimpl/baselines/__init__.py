"""Methods that the papers compare with, under the same interface and the same tests as those of the papers."""

from refimpl.baselines.gptq import GPTQ
from refimpl.baselines.pruning import Magnitude, SparseGPT, Wanda
from refimpl.baselines.rtn import RTN
from refimpl.baselines.svd import ActSVD, LoftQ, PlainSVD

__all__ = ["GPTQ", "RTN", "ActSVD", "LoftQ", "Magnitude", "PlainSVD", "SparseGPT", "Wanda"]
