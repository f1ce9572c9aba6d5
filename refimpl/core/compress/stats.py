"""Input statistics of sites, gathered in one pass, without keeping the inputs.

For a layer with inputs x_1 ... x_T (rows), the methods of this book need at most the second moment
G = sum_t x_t x_t^T and the mean of |x|. Both are sums, so they stream over batches and add up over processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refimpl.core.compress.sites import Site
from refimpl.core.device import read
from refimpl.core.errors import CalibrationError


class InputStats:
    """Sums over the inputs of one layer.

    Args:
        in_features: width d of the inputs.
        device: where the sums live.
        wanted: a subset of {"gram", "abs"}: the second moment [d, d], and sum |x| with sum x^2 [d].

    Example:
        >>> stats = InputStats(2, "cpu", {"gram"})
        >>> stats.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> stats.gram.tolist(), stats.tokens
        ([[1.0, 2.0], [2.0, 5.0]], 2)
    """

    def __init__(self, in_features: int, device: torch.device | str, wanted: Iterable[str]) -> None:
        self.tokens = 0
        wanted = frozenset(wanted)
        self._sums: dict[str, Tensor] = {}
        if "gram" in wanted:
            self._sums["gram"] = torch.zeros(in_features, in_features, device=device)
        if "abs" in wanted:
            self._sums["abs"] = torch.zeros(in_features, device=device)
            self._sums["square"] = torch.zeros(in_features, device=device)

    @property
    def gram(self) -> Tensor:
        """G = sum_t x_t x_t^T, fp32 [d, d]: a plain sum, not a mean."""
        return self._sums["gram"]

    @property
    def mean_abs(self) -> Tensor:
        """Mean over tokens of |x_i|, fp32 [d]."""
        return self._sums["abs"] / max(self.tokens, 1)

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of each input channel over all tokens, fp32 [d]."""
        return self._sums["square"].sqrt() if "square" in self._sums else self.gram.diagonal().sqrt()

    def add(self, x: Tensor) -> None:
        """Add inputs of any shape [..., d]; sums are kept in fp32 whatever the dtype of x."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += x.shape[0]
        if "gram" in self._sums:
            self._sums["gram"].addmm_(x.T, x)
        if "abs" in self._sums:
            self._sums["abs"] += x.abs().sum(0)
            self._sums["square"] += x.square().sum(0)

    def all_reduce(self) -> None:
        """Add up the sums of all processes of the default group (each saw its own tokens)."""
        device = next(iter(self._sums.values())).device
        tokens = torch.tensor(self.tokens, device=device, dtype=torch.float64)
        for tensor in [*self._sums.values(), tokens]:
            dist.all_reduce(tensor)
        self.tokens = int(read(tokens))

    def check_finite(self, name: str) -> None:
        """Raise `CalibrationError` if any input of site `name` was NaN or infinite."""
        for tensor in self._sums.values():
            if read((~torch.isfinite(tensor)).any()):
                raise CalibrationError(
                    f"calibration: the inputs of {name!r} contain NaN or infinity; "
                    "try dtype=float32 for the model, or check the tokens and the checkpoint"
                )


class Collector:
    """Context manager that fills `InputStats` for sites while the caller runs the model.

    Sites fed by the same tensor (q, k and v; gate and up) share one statistics object, found by identity of the
    tensor at the first batch, so the second moment is computed and stored once for them.

    Args:
        sites: where to look.
        wanted: see `InputStats`.

    Example:
        >>> layer = nn.Sequential(nn.Linear(3, 16))
        >>> with Collector([Site("0", 0, layer, "0")], {"gram"}) as collector:
        ...     _ = layer(torch.ones(5, 3))
        >>> collector.stats["0"].tokens
        5
    """

    def __init__(self, sites: list[Site], wanted: Iterable[str]) -> None:
        self.sites, self.wanted = sites, frozenset(wanted)
        self.stats: dict[str, InputStats] = {}
        self._owner: dict[str, str] = {}  # site -> the site whose statistics it shares
        self._last: tuple[Any, str] = (None, "")

    def _hook(self, site: Site) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, name = args[0], site.name
            if name not in self._owner:
                last, owner = self._last
                if last is x:
                    self._owner[name], self.stats[name] = owner, self.stats[owner]
                else:
                    self._owner[name] = name
                    self.stats[name] = InputStats(x.shape[-1], x.device, self.wanted)
            if self._owner[name] == name:
                self.stats[name].add(x)
                self._last = (x, name)

        return before

    def __enter__(self) -> Collector:
        self._handles = [site.module.register_forward_pre_hook(self._hook(site)) for site in self.sites]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = (None, "")
        if kind is not None:
            return
        for name, owner in self._owner.items():
            if owner == name:
                if dist.is_available() and dist.is_initialized():
                    self.stats[name].all_reduce()
                self.stats[name].check_finite(name)
