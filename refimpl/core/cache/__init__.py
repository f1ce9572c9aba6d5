"""Compressed key-value caches that work in ``generate``.

A policy (a short dataclass, see `refimpl.baselines.kvcache`) makes a `CompressedCache` for a model:

    cache = SnapKV().cache(model, budget=0.2, length=2048)
    model.generate(**inputs, cache=cache)   # before transformers 5.24: past_key_values=cache
"""

from refimpl.core.cache.attention import NAME, Dense, Mask, Segment, attend, cache_argument, weights
from refimpl.core.cache.content import ByContent
from refimpl.core.cache.host import CompressedCache, fingerprint, prefill
from refimpl.core.cache.layer import CountedTail, Incoming, KVLayer, TailLayer, WindowLayer
from refimpl.core.cache.policy import LayerShape, Policy, UpTo, check_rank
from refimpl.core.cache.rope import Rotary, rotate, unrotate
from refimpl.core.cache.sinks import Sinks, keep_sinks
from refimpl.core.cache.tap import attention_modules, full_attention_layers, hidden_states, tapped

__all__ = [
    "NAME",
    "ByContent",
    "CompressedCache",
    "CountedTail",
    "Dense",
    "KVLayer",
    "LayerShape",
    "Mask",
    "Incoming",
    "Policy",
    "Rotary",
    "Segment",
    "Sinks",
    "TailLayer",
    "UpTo",
    "WindowLayer",
    "attend",
    "attention_modules",
    "cache_argument",
    "check_rank",
    "fingerprint",
    "full_attention_layers",
    "hidden_states",
    "keep_sinks",
    "prefill",
    "rotate",
    "tapped",
    "unrotate",
    "weights",
]
