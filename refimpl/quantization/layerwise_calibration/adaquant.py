"""Steps 1 and 2: measure ranges, then train weights, bias and quantisers of each layer towards its float outputs.

Rounding to nearest takes the grid point closest to each weight. AdaQuant takes the grid, and the point for each weight,
that leave the *outputs* of the layer closest to the float ones. With a continuous perturbation V of the weights W, the
steps Delta_w, Delta_x of the two grids, inputs X and float outputs Y = W X + b, the paper solves for each layer

    argmin over V, b, Delta_w, Delta_x    || f(Y) - f(Q_w(W + V) Q_x(X) + Q_b(b)) ||^2

where f is the ReLU that follows the layer, or the identity. W + V may end up anywhere, not only at one of the two grid
points next to W. One layer has few unknowns against many outputs, so a small calibration set is enough where training
the network end to end would over-fit it.

A grid of L = 2^n - 1 steps is given by its range R and its lowest value Z: Delta = R / L, and zero has the integer code
z = round(-Z / Delta). Rounding passes gradients straight through, so with v = w / Delta and E the error of the outputs,

    Q(w)       = Delta round(clip(v, -z, L - z))
    dE/dV      = dE/dQ                                             where -z <= v <= L - z, and 0 where w is clipped
    dE/dDelta  = sum dE/dQ (round(v) - v)                          over the weights inside the grid
               + sum dE/dQ (-z - Z/Delta)                          over those below it
               + sum dE/dQ (L - z - Z/Delta)                       over those above it
    dE/dR      = dE/dDelta / L,     dE/dZ = sum dE/dQ              over the weights outside the grid
    dE/dQ_w    = -2 (Y - Q_w Q_x - Q_b) Q_x^T                      for f the identity

and the same for Q_x with its own Delta. Like the authors' code, this one trains W + V as one tensor that starts at W.
`refimpl.core.compress.reconstruct` computes the objective and autograd its gradients; `Reconstruction` measures the
ranges of a layer (step 1) and calls `AdaQuant.train` (step 2).
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
    bin. "scaled" (ours) are relative to the step and the range of the layer, see
    `refimpl.core.compress.reconstruct.scaled_rates`.

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
        # Adam moves a weight by at most 1e-5 an update, 0.01 over the paper's 1000: half a step of a 4-bit grid in
        # ResNet-50, a small fraction of one in a small network. The lowest value Z trains at the rate of its range R.
        lr = {id(layer.W): 1e-5, id(layer.R): 1e-3, id(layer.b): 1e-3, id(layer.R_x): 1e-1}
        groups = [{**group, "lr": lr[id(group["params"][0])]} for group in groups]
    return [{**group, "lr": speed * group["lr"]} for group in groups]


@dataclass(frozen=True)
class AdaQuant(Reconstruction):
    """Quantise weights, and inputs if asked for, so that the outputs of each layer change as little as possible.

    Every layer is trained by itself. With ``order="parallel"`` of `compress` its inputs X are those of the float
    network, so copies at different precisions can be mixed afterwards (step 3). With "sequential" X comes from the
    layers before it as they are after quantisation, while the target Y stays the float output, so that a layer
    compensates for the errors of those before it.

    Args:
        bits: of the weights, 2 to 8.
        activation_bits: of the inputs of every site, 2 to 8. None leaves them in floating point: the objective is then
            computed exactly from the second moment of the inputs, and biases stay as they are. With a number, batches
            of cached inputs and outputs are used, biases train too and lie on a grid of `bits` + `activation_bits`.
        group_size: inputs per scale; None is one scale per output channel, as in the paper.
        iterations: updates per layer (the paper: 1000); 0 only measures ranges, the paper's light pipeline.
        samples: cached samples per update.
        rates: "published" are the authors' absolute rates, which stay constant; "scaled" (ours) are relative to the
            layer and fall to zero along a cosine. See `learning_rates`.
        speed: multiplies every learning rate.
        clip: initial weight ranges, "minmax" (the paper) or "mse".
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
        # Step 2 for one layer. `layer` starts at V = 0 with the ranges of step 1. With inputs in floating point,
        # Q_x(X) = X, the objective is tr(D G D^T) with D = W - Q_w(W + V) and G = X X^T: X itself need not be kept.
        schedule = "cosine" if self.rates == "scaled" else "constant"
        return reconstruct(
            layer,
            stats,
            Recipe(self.iterations, schedule=schedule, seed=self.seed),
            target=target,
            samples=self.samples,
            parameters=learning_rates(layer, self.rates, self.speed),
        )
