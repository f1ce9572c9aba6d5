"""The only place where a tensor's value crosses from the device to Python.

Every other line stays on the tensor's device, which is what the fake-CUDA test checks; it replaces
`read` by a constant, since a fake tensor has no value to read.
"""

from __future__ import annotations

from torch import Tensor


def read(value: Tensor) -> float:
    """The value of a one-element tensor (waits for the device).

    Example:
        >>> import torch
        >>> read(torch.tensor(2.5))
        2.5
    """
    return value.item()
