"""Key-value cache policies that the papers compare with; each works in ``generate``."""

from refimpl.baselines.kvcache.full import Full
from refimpl.baselines.kvcache.h2o import H2O
from refimpl.baselines.kvcache.kivi import KIVI
from refimpl.baselines.kvcache.snapkv import SnapKV
from refimpl.baselines.kvcache.streaming import StreamingLLM
from refimpl.baselines.kvcache.think import ThinK

__all__ = ["H2O", "KIVI", "Full", "SnapKV", "StreamingLLM", "ThinK"]
