"""The operations that depend on the device or the process: reading a value, freeing memory, who else is at work.

`read` and `read_all` are the only places where values cross from the device to Python. All other code stays on the
tensor's device. A test with fake CUDA tensors checks this; it replaces both functions by constants, because a fake tensor
has no value to read.
"""

from __future__ import annotations

import ctypes
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from refimpl.core.errors import OptionError, reason


def read(value: Tensor) -> float:
    """The value of a one-element tensor (waits for the device).

    Example:
        >>> import torch
        >>> read(torch.tensor(2.5))
        2.5
    """
    return value.item()


def read_all(values: Tensor) -> list[float]:
    """The values of a vector, with one wait for the device.

    Example:
        >>> import torch
        >>> read_all(torch.tensor([2.5, 1.0]))
        [2.5, 1.0]
    """
    return values.tolist()


def check_device(device: torch.device | str | int) -> None:
    """Raise `OptionError` unless tensors can be put on a device.

    Example:
        >>> check_device("cpu")
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch: unknown, or not in this machine
        raise OptionError(f"device={str(device)!r} cannot be used here ({reason(error)}); use 'cpu'") from error


def rank_and_world() -> tuple[int, int]:
    """The number of this process in its group, and the size of the group; 0 and 1 without one.

    Example:
        >>> rank_and_world()
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def give_back() -> None:
    """Hand freed memory back to the system.

    glibc keeps what it thinks it will need again, in holes between small objects that live on: walking a model block
    by block then holds nearly as much as the whole model. Other systems return it by themselves.

    Example:
        >>> give_back()
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from musl
        if trim is not None:
            trim(0)
