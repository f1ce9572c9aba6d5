"""AdaQuant and integer programming: 4 bits for weights and activations from a few unlabelled images.

Source: Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
2020, arXiv 2006.10518, and the authors' code. Claim: layers trained one by one towards their own outputs, bits
allotted to layers by an integer program, and batch-norm statistics and biases repaired afterwards: with all three,
weights and activations of 4 bits cost less than one point of accuracy, from one image per class.

The steps, in order: `fold_batch_norms` (core), `AdaQuant` with `compress` at each precision, `sensitivity`,
`allocate_bits`, `assemble`, `retune_batch_norms`, `tune_biases`.
"""

from refimpl.quantization.layerwise_calibration.adaquant import AdaQuant, learning_rates
from refimpl.quantization.layerwise_calibration.allocation import (
    Allocation,
    allocate_bits,
    assemble,
    bit_operations_saved,
    bytes_saved,
    sensitivity,
)
from refimpl.quantization.layerwise_calibration.tuning import retune_batch_norms, tune_biases

__all__ = [
    "AdaQuant",
    "Allocation",
    "allocate_bits",
    "assemble",
    "bit_operations_saved",
    "bytes_saved",
    "learning_rates",
    "retune_batch_norms",
    "sensitivity",
    "tune_biases",
]
