"""Steps 1 and 2: ranges, and AdaQuant: weights, bias and quantisers of one layer, trained for its outputs.

Rounding to nearest asks which grid point is closest to each weight. AdaQuant asks which grid, and which point for each
weight, leave the *outputs* of the layer closest to the float ones; weights may move anywhere, not only to one of their
two neighbours. One layer has few unknowns against many outputs, so a small calibration set is enough where training
the network end to end would over-fit it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from refimpl.baselines.reconstruction import Reconstruction
from refimpl.core.compress.reconstruct import QuantizedSite, reconstruct, scaled_rates
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.loop import Recipe

RATES = ("scaled", "published")


def learning_rates(layer: QuantizedSite, rates: str = "scaled", speed: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups of one layer with the learning rates of its weights, bias and ranges.

    "published" are the authors' absolute values, tuned for ImageNet networks at 8 bits: 1e-5 for weights, 1e-3 for
    biases and weight ranges, 1e-1 for input ranges. In a small layer on a coarse grid such weights never leave their
    bin. "scaled" (ours) says it in units of the layer, see `refimpl.core.compress.reconstruct.scaled_rates`.

    Args:
        layer: the layer to train.
        rates: "scaled" or "published".
        speed: multiplies them all.

    Example:
        >>> from torch import nn
        >>> from refimpl.core.compress.sites import Site
        >>> layer = QuantizedSite(Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"), bits=4, group=32)
        >>> [group["lr"] for group in learning_rates(layer, "published")]
        [1e-05, 0.001]
    """
    groups = scaled_rates(layer)
    if rates == "published":
        lr = {id(layer.W): 1e-5, id(layer.R): 1e-3, id(layer.b): 1e-3, id(layer.R_x): 1e-1}
        groups = [{**group, "lr": lr[id(group["params"][0])]} for group in groups]
    return [{**group, "lr": speed * group["lr"]} for group in groups]


@dataclass(frozen=True)
class AdaQuant(Reconstruction):
    """Quantise weights, and inputs if wanted, so that each layer's outputs stay what they were.

    Every layer is trained by itself. With ``order="parallel"`` of `compress` it sees float inputs, so copies at
    different precisions can be mixed afterwards; with "sequential" it sees the inputs the quantised layers before it
    give, and its float outputs as the target, which makes up for their errors.

    Args:
        bits: of the weights, 2 to 8.
        activation_bits: of the inputs of every site, 2 to 8. None leaves them in floating point: the objective is then
            computed exactly from the second moment of the inputs, and biases stay as they are. With a number, batches
            of cached inputs and outputs are used, biases train too and lie on a grid of `bits` + `activation_bits`.
        group_size: inputs per scale; None is one scale per output channel, as in the paper.
        iterations: updates per layer (the paper: 1000); 0 measures ranges only, the paper's light pipeline.
        samples: cached samples per update.
        rates: "published" are the authors' absolute rates, which stay constant; "scaled" (ours) are in units of the
            layer and fall to zero along a cosine. See `learning_rates`.
        speed: multiplies every learning rate.
        clip: where weight ranges start: "minmax" (the paper) or "mse".
        seed: of the order of the samples.

    Example:
        >>> AdaQuant(bits=4, group_size=64).statistics, AdaQuant(bits=4, activation_bits=8).statistics
        (frozenset({'gram'}), frozenset({'inputs'}))
    """

    rates: str = "scaled"
    speed: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates not in RATES:
            raise OptionError(f"rates={self.rates!r}: use {nearest(self.rates, RATES)}")
        if not self.speed > 0:
            raise OptionError(f"speed={self.speed}: use a positive factor")

    def train(self, layer: QuantizedSite, stats: InputStats, target: Tensor) -> dict[str, float]:
        schedule = "cosine" if self.rates == "scaled" else "constant"
        return reconstruct(
            layer,
            stats,
            Recipe(self.iterations, schedule=schedule, seed=self.seed),
            target=target,
            samples=self.samples,
            parameters=learning_rates(layer, self.rates, self.speed),
        )
