"""AdaRound: learn for every weight whether to round it up or down (Nagel et al., 2020, arXiv 2004.10568, sections 3, 4).

The grid is fixed. A weight becomes ``Delta * clip(floor(w / Delta) + h(V), -z, L - z)`` with the rectified sigmoid
``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` (eq. 23), which can reach 0 and 1, and the regulariser
``sum 1 - |2 h(V) - 1|^beta`` (eq. 24) pushes every h to one of them as beta falls from 20 to 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from refimpl.baselines.reconstruction import Reconstruction
from refimpl.core.compress.reconstruct import QuantizedSite, reconstruct
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers.grid import Grid
from refimpl.core.layers.quantizer import snap, step_and_zero
from refimpl.core.train.loop import Recipe

STRETCH = (-0.1, 1.1)  # gamma and zeta
WARM_UP = 0.2  # share of the updates without the regulariser
BETA = (20.0, 2.0)


class RoundedSite(QuantizedSite):
    """A site whose weights go to one of the two grid points next to them; only V is trained.

    Attributes:
        V: [out, groups, group]; h(V) starts at the fraction of the weight between its two neighbours.
        beta: exponent of the regulariser; 0 while it is off.

    Example:
        >>> from refimpl.core.compress.sites import Site
        >>> layer = RoundedSite(Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"), bits=4, group=32)
        >>> bool((layer.weight - layer.W.flatten(1)).abs().median() < 1e-6)   # not rounded yet, but a few are clipped
        True
    """

    beta: Tensor
    floor: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requires_grad_(False)
        self.R.data, self.Z.data = snap(self.R, self.Z, self.bits)
        step, _ = step_and_zero(self.R, self.Z, self.bits)
        self.register_buffer("floor", torch.floor(self.W / step))
        low, high = STRETCH
        # V starts where h(V) is the fraction w / Delta - floor(w / Delta): the layer starts at its float weights
        share = (self.W / step - self.floor - low) / (high - low)
        self.V = nn.Parameter(torch.log(share / (1 - share)))
        self.register_buffer("beta", torch.zeros((), device=self.W.device))

    def up(self) -> Tensor:
        """h(V), between rounding down (0) and up (1)."""
        low, high = STRETCH
        return (torch.sigmoid(self.V) * (high - low) + low).clamp(0, 1)

    def quantized(self) -> Tensor:
        up = self.up() if self.training else (self.up() >= 0.5).to(self.V.dtype)
        step, zero = step_and_zero(self.R, self.Z, self.bits)
        return step * (self.floor + up).clamp(-zero, 2**self.bits - 1 - zero)

    def codes(self, grid: Grid) -> Tensor:
        rounded = self.floor + (self.up() >= 0.5)
        return (rounded + grid.zero).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def undecided(self) -> Tensor:
        """Mean of 1 - |2 h(V) - 1|^beta; 0 while the regulariser is off, since beta is then 0."""
        return (1 - (2 * self.up() - 1).abs().clamp_min(1e-6) ** self.beta).mean()


@dataclass(frozen=True)
class AdaRound(Reconstruction):
    """Choose up or down for every weight so that the outputs of each layer change as little as possible.

    Input ranges are measured and then fixed; inputs are quantised while the weights train.

    Args:
        clip: initial weight ranges, "mse" (the paper: least mean squared error) or "minmax".
        lr: learning rate of V with Adam (the paper: 1e-3 for 10,000 updates; fewer updates need a larger one).
        regulariser: weight of the regulariser. The objective here is relative to the energy of the outputs and the
            regulariser a mean over the weights, so that one value suits layers of any size.

    Example:
        >>> AdaRound(bits=4, group_size=64).clip
        'mse'
    """

    clip: str = "mse"
    lr: float = 0.1
    regulariser: float = 0.1
    site_type: ClassVar[type[QuantizedSite]] = RoundedSite

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lr > 0 and self.regulariser >= 0):
            raise OptionError(
                f"lr={self.lr}, regulariser={self.regulariser}: use a positive rate, and a weight of 0 or more"
            )

    def train(self, layer: QuantizedSite, stats: InputStats, target: Tensor) -> dict[str, float]:
        rounded = cast(RoundedSite, layer)
        recipe = Recipe(self.iterations, lr=self.lr, schedule="constant", seed=self.seed)
        return reconstruct(
            layer,
            stats,
            recipe,
            target=target,
            samples=self.samples,
            parameters=[{"params": [rounded.V]}],
            penalty=lambda layer: self.regulariser * layer.undecided(),
            after_step=[self._anneal],
        )

    def _anneal(self, step: int, layer: nn.Module) -> None:
        done = (step / self.iterations - WARM_UP) / (1 - WARM_UP)
        if done >= 0:
            cast(RoundedSite, layer).beta.fill_(BETA[0] + (BETA[1] - BETA[0]) * done)
