"""Fewer bits per weight and activation: one file or folder per paper."""

from refimpl.quantization.layerwise_calibration import AdaQuant

__all__ = ["AdaQuant"]
