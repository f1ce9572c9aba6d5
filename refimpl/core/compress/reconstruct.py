"""Layer-wise reconstruction: train the replacement of one site towards the outputs of the original.

`QuantizedSite` is a site with trainable quantisers on its weights, its bias and, if asked for, its inputs.
`reconstruct` trains one to minimise its output error, in one of two forms:

    inputs in floating point   tr((W - Q(W)) G (W - Q(W))^T) / tr(W G W^T)    with G = X X^T, the second moment of all
                                                                             inputs: one exact matrix product
    inputs quantised           mean (f(Y) - f(Q(W) Q(X) + Q(b)))^2 / mean f(Y)^2    on batches of cached inputs X and
                                                                             float outputs Y = W X + b

f is the ReLU that follows the site, or the identity. The denominators make the value the same in layers of any scale.
In evaluation mode a site uses the grid that will be stored, so the error measured there is the error of the export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from refimpl.core.compress.inputs import InputSamples
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.device import read
from refimpl.core.layers import ActivationQuantizer, CompressedLayer, PackedLinear, QuantizedInput
from refimpl.core.layers.grid import Grid
from refimpl.core.layers.quantizer import RANGES, SMALLEST, fake_quantize, minmax_range, snap, to_grid
from refimpl.core.train.loop import Batch, Hook, Recipe, batches, train

_LOOKS = 10  # evaluations of the full objective during a training
_CHUNK = 100  # cached samples per forward pass of such an evaluation


class QuantizedSite(nn.Module):
    """A site whose weights, bias and inputs pass through quantisers; values and ranges are parameters.

    Args:
        site: the site to replace; its module is not changed.
        bits: of the weights.
        group: inputs per scale.
        clip: initial ranges of the weights, "minmax" or "mse".
        mask, pattern: of a sparse site; its zeros stay zero.
        inputs: (bits, low, high), the bits of the inputs and their initial range; None leaves inputs and bias in
            floating point.

    Attributes:
        W: [out, groups, group] fp32. b: [out] fp32 or None.
        R, Z: [out, groups, 1], range and lowest value of each group of weights.
        R_x, Z_x: [], range and lowest value of the inputs; None without `inputs`.

    Example:
        >>> layer = QuantizedSite(Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"), bits=4, group=32)
        >>> layer(torch.zeros(3, 64)).shape, layer.R.shape
        (torch.Size([3, 16]), torch.Size([16, 2, 1]))
    """

    R_x: nn.Parameter | None
    Z_x: nn.Parameter | None

    def __init__(
        self,
        site: Site,
        bits: int,
        group: int,
        clip: str = "minmax",
        mask: Tensor | None = None,
        pattern: str | None = None,
        inputs: tuple[int, Tensor | float, Tensor | float] | None = None,
    ) -> None:
        super().__init__()
        W = site.weight.detach()
        self.bits, self.mask, self.pattern, self.dtype, self.geometry = (bits, mask, pattern, W.dtype, site.geometry)
        self.W = nn.Parameter(W.float().unflatten(1, (-1, group)).clone())
        R, Z = RANGES[clip](self.W.detach(), bits)
        self.R, self.Z = nn.Parameter(R), nn.Parameter(Z)
        self.input_bits = None if inputs is None else inputs[0]
        bias = None if site.bias is None else site.bias.detach().float().clone()
        self.b = None if bias is None else nn.Parameter(bias, requires_grad=inputs is not None)
        self.R_x = self.Z_x = None
        if inputs is not None:
            low, high = (torch.as_tensor(end, dtype=torch.float32, device=W.device) for end in inputs[1:])
            self.R_x, self.Z_x = nn.Parameter(high - low), nn.Parameter(low.clone())

    def grid(self) -> tuple[Tensor, Tensor]:
        """The R and Z in use: unrounded in training mode, snapped to what will be stored in evaluation mode."""
        return (self.R, self.Z) if self.training else snap(self.R, self.Z, self.bits)

    def quantized(self) -> Tensor:
        """Q(W) in groups, [out, groups, group]."""
        return fake_quantize(self.W, *self.grid(), self.bits)

    @property
    def weight(self) -> Tensor:
        """Q(W) [out, in], with the zeros of a sparse site. A property, because some models read `layer.weight`."""
        weight = self.quantized().flatten(1)
        return weight if self.mask is None else weight * self.mask

    @property
    def bias(self) -> Tensor | None:
        """Q(b) on a grid with the bits of weights and inputs added up; b itself if the inputs are in floating point."""
        if self.b is None or self.input_bits is None:
            return self.b
        return fake_quantize(self.b, *minmax_range(self.b.detach()), self.bits + self.input_bits)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_bits is not None:
            assert self.R_x is not None and self.Z_x is not None
            x = fake_quantize(x, self.R_x, self.Z_x, self.input_bits)
        if self.geometry is None:
            return F.linear(x, self.weight, self.bias)
        return self.geometry.convolve(x, self.weight, self.bias)

    def codes(self, grid: Grid) -> Tensor:
        """Codes of the weights on the stored grid, uint8 [out, groups, group]."""
        return grid.encode(self.W)

    @torch.no_grad()
    def packed(self) -> CompressedLayer:
        """The layer to store; it computes what this one computes in evaluation mode, in the dtype of the site."""
        grid = to_grid(self.R, self.Z, self.bits)
        bias = self.bias
        layer = PackedLinear(
            codes=self.codes(grid).flatten(1),
            scale=grid.scale[..., 0],
            zero=grid.zero[..., 0],
            bits=self.bits,
            mask=self.mask,
            pattern=self.pattern,
            bias=None if bias is None else bias.to(self.dtype),
            dtype=self.dtype,
        )
        if self.input_bits is None:
            return layer
        assert self.R_x is not None and self.Z_x is not None
        return QuantizedInput(layer, ActivationQuantizer(self.input_bits, self.R_x, self.Z_x))


def scaled_rates(layer: QuantizedSite, rate: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups of a quantised site, with learning rates that suit its scale and bits.

    Adam moves a parameter by about its learning rate per update. So per update weights move by about `rate` times the
    mean step of the grid, ranges and lowest values by `rate` times the mean range, biases by a tenth of `rate`.

    Example:
        >>> layer = QuantizedSite(Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"), bits=4, group=32)
        >>> weights, ranges = scaled_rates(layer)
        >>> round(ranges["lr"] / weights["lr"], 3)
        15.0
    """
    span = read(layer.R.detach().mean())
    groups: list[dict[str, Any]] = [
        {"params": [layer.W], "lr": rate * span / (2**layer.bits - 1)},
        {"params": [layer.R, layer.Z], "lr": rate * span},
    ]
    if layer.R_x is not None:
        groups.append({"params": [layer.R_x, layer.Z_x], "lr": rate * read(layer.R_x.detach())})
        if layer.b is not None:
            groups.append({"params": [layer.b], "lr": 0.1 * rate})
    # the range of a layer of zeros is 0, but a rate must be positive
    return [{**group, "lr": max(group["lr"], SMALLEST)} for group in groups]


def quadratic(D: Tensor, gram: Tensor) -> Tensor:
    """tr(D G D^T) with its gradient 2 D G, computed with one matrix product where autograd would need two.

    Args:
        D: [m, d]; may require a gradient.
        gram: G [d, d], symmetric.

    Example:
        >>> D = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> value = quadratic(D, torch.diag(torch.tensor([1.0, 3.0])))
        >>> value.backward()
        >>> value.item(), D.grad.tolist()
        (13.0, [[2.0, 12.0]])
    """
    linear = ((D.detach() @ gram) * D).sum()  # the right value, but only half the gradient: D G
    return 2 * linear - linear.detach()


Objective = tuple[DataLoader, Callable[[Any, Batch], Tensor], Callable[[nn.Module], dict[str, float]]]


def _on_gram(layer: QuantizedSite, target: Tensor, gram: Tensor) -> Objective:
    energy = quadratic(target, gram).clamp_min(torch.finfo(torch.float32).tiny)

    def loss(model: Any, batch: Batch) -> Tensor:
        return quadratic(target - layer.weight, gram) / energy  # E = tr((W - Q(W)) G (W - Q(W))^T) / tr(W G W^T)

    def evaluate(model: Any) -> dict[str, float]:
        return {"error": read(loss(model, ()))}

    nothing: Any = [()]  # one empty batch per epoch: G already holds all inputs
    return DataLoader(nothing, batch_size=None), loss, evaluate


def _on_samples(cache: InputSamples, samples: int, seed: int) -> Objective:
    x, y = cache.x.float(), cache.y.float()
    y = F.relu(y) if cache.rectified else y
    energy = y.square().mean().clamp_min(torch.finfo(torch.float32).tiny)

    def squares(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        output = layer(x)  # Q(W) Q(x) + Q(b)
        return ((F.relu(output) if cache.rectified else output) - y).square()

    def loss(layer: Any, batch: Batch) -> Tensor:
        return squares(layer, *batch).mean() / energy

    def evaluate(layer: Any) -> dict[str, float]:
        chunks = zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
        total = torch.stack([squares(layer, *chunk).sum() for chunk in chunks]).sum()
        return {"error": read(total / energy) / y.numel()}

    return batches(x, y, batch_size=samples, seed=seed), loss, evaluate


def reconstruct(
    layer: QuantizedSite,
    stats: InputStats,
    recipe: Recipe,
    *,
    target: Tensor,
    samples: int = 50,
    parameters: Sequence[dict[str, Any]] | None = None,
    penalty: Callable[[Any], Tensor] | None = None,
    after_step: Sequence[Hook] = (),
) -> dict[str, float]:
    """Train a quantised site towards the outputs of the original, and keep the iterate with the least error on all data.

    Args:
        layer: the site, trained in place and left in evaluation mode.
        stats: `InputSamples` if inputs are quantised, otherwise statistics with a second moment.
        recipe: length and schedule of the training.
        target: the original weight W [out, in]; not used with `InputSamples`, which hold the original outputs.
        samples: cached samples per batch.
        parameters: parameter groups with their learning rates; all parameters at the recipe's rate if None.
        penalty: a function of the layer, added to the loss during training and left out of the reported errors.
        after_step: hooks of the training loop.

    Returns:
        "before" and "after": the objective on all data before training and with the iterate that is kept; "best_step": the
        update after which that was, 0 if training has not helped.

    Raises:
        OptionError: fewer samples than a batch.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> site, stats = Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"), InputStats(64, "cpu", {"gram"})
        >>> stats.add(torch.randn(200, 64))
        >>> layer = QuantizedSite(site, bits=2, group=64)
        >>> errors = reconstruct(layer, stats, Recipe(20, lr=1e-3, schedule="constant"), target=site.weight)
        >>> errors["after"] < errors["before"]
        True
    """
    if isinstance(stats, InputSamples):
        data, loss, evaluate = _on_samples(stats, samples, recipe.seed)
    else:
        data, loss, evaluate = _on_gram(layer, target.float(), stats.gram)

    def total(model: Any, batch: Batch) -> Tensor:
        return loss(model, batch) if penalty is None else loss(model, batch) + penalty(layer)

    with torch.enable_grad():
        history = train(
            layer,
            data,
            total,
            recipe,
            parameters=parameters,
            after_step=after_step,
            evaluate=evaluate,
            evaluate_every=max(1, recipe.steps // _LOOKS),
            keep_best="error",
            progress=False,
        )
    layer.eval()
    errors = [entry["error"] for entry in history.evaluations]
    return {"before": errors[0], "after": min(errors), "best_step": float(history.best or 0)}
