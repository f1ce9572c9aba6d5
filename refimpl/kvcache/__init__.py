"""Smaller caches of keys and values: one file per paper."""

from refimpl.kvcache.cskv import CSKV
from refimpl.kvcache.matryoshka_kv import MatryoshkaKV

__all__ = ["CSKV", "MatryoshkaKV"]
