"""Smaller caches of keys and values: one file per paper."""

from refimpl.kvcache.cskv import CSKV

__all__ = ["CSKV"]
