"""Pruning: one file per paper."""

from refimpl.pruning.gradual_magnitude import GradualMagnitude

__all__ = ["GradualMagnitude"]
