"""Low-rank and shared weights: one file per paper."""

from refimpl.lowrank.eora import EoRA

__all__ = ["EoRA"]
