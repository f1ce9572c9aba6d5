"""A kernel launch as data, so that what is audited, counted and interpreted is exactly what a GPU would run."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    A kernel file makes it from tensors on any device, "meta" included: a CUDA tensor is launched, a CPU tensor is
    interpreted (`TRITON_INTERPRET=1`), and a meta tensor is enough to compile for a GPU that is not there.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along up to three axes.
        arguments: tensors and numbers by parameter name.
        constants: ``tl.constexpr`` parameters by name.
        num_warps, num_stages: as Triton takes them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def __call__(self) -> None:
        """Run it."""
        # the device of the tensors, not the current one: models are spread over several GPUs
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](
                **self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages
            )


@functools.cache
def warn_once(kernel: str, reason: str) -> None:
    """Say that a kernel is not used, and why; each reason once in a process.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_once("demo", "rank 3 is no multiple of 16")
        ...     warn_once("demo", "rank 3 is no multiple of 16")
        >>> [str(warning.message) for warning in caught]
        ['demo: rank 3 is no multiple of 16; PyTorch computes it instead, which is slower']
    """
    warnings.warn(f"{kernel}: {reason}; PyTorch computes it instead, which is slower", stacklevel=3)
