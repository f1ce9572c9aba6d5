"""Layer-wise reconstruction: train one site's replacement so that the outputs of the site stay what they were.

`QuantizedSite` is a site with quantisers on weights, bias and (if wanted) inputs, all trainable. `reconstruct` trains
one against either of two objectives, both relative to the energy of the outputs:

    weights only   tr((W - Q) G (W - Q)^T) / tr(W G W^T), from the second moment G of the inputs: all tokens, exactly
    with inputs    mean (f(Y) - f(Q(W) Q(x) + Q(b)))^2 / mean f(Y)^2, on cached inputs x and float outputs Y, in batches

where f is the ReLU that follows the site, if one does. The grid in use in evaluation mode is the one that will be
stored, so what is measured there is what is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from refimpl.core.compress.inputs import InputSamples
from refimpl.core.compress.quantizer import RANGES, SMALLEST, fake_quantize, minmax_range, snap, to_grid
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.device import read
from refimpl.core.layers import ActivationQuantizer, CompressedLayer, PackedLinear, QuantizedInput
from refimpl.core.layers.grid import Grid
from refimpl.core.train.loop import Batch, Hook, Recipe, batches, train

_LOOKS = 10  # evaluations of the full objective during a training
_CHUNK = 100  # cached samples per forward pass when all are looked at


class QuantizedSite(nn.Module):
    """A site whose weights, bias and inputs pass quantisers; every quantity is a parameter.

    Args:
        site: the site; its module is not touched.
        bits: of the weights.
        group: inputs per scale.
        clip: how the weight ranges start, "minmax" or "mse".
        mask, pattern: of a sparse site, whose zeros stay.
        inputs: bits of the inputs and where their range starts, (bits, low, high); None leaves inputs and bias as
            they are.

    Attributes:
        W: [out, groups, group] fp32. b: [out] fp32 or None.
        R, Z: [out, groups, 1], range and lowest value of each group of weights.
        R_x, Z_x: [], the same of the inputs; None without `inputs`.

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
        """R and Z in force: as they are while training, as they will be stored in evaluation mode."""
        return (self.R, self.Z) if self.training else snap(self.R, self.Z, self.bits)

    def quantized(self) -> Tensor:
        """Q(W) in groups, [out, groups, group]."""
        return fake_quantize(self.W, *self.grid(), self.bits)

    @property
    def weight(self) -> Tensor:
        """Q(W) [out, in], with the zeros of a sparse site. (A property: some models look at a layer's weight.)"""
        weight = self.quantized().flatten(1)
        return weight if self.mask is None else weight * self.mask

    @property
    def bias(self) -> Tensor | None:
        """Q(b), on a grid of as many bits as weights and inputs have together; b itself where inputs are float."""
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
        """The layer to store: it applies what this one applies in evaluation mode, in the dtype of the site."""
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
    """Parameter groups of a quantised site with learning rates in units of the layer.

    Weights move by about `rate` times the mean step of the grid per update (with Adam), ranges and lowest values by
    `rate` times the mean range, biases by a tenth of `rate`.

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
    # a layer of zeros has nothing to learn, but a rate must be positive
    return [{**group, "lr": max(group["lr"], SMALLEST)} for group in groups]


def quadratic(D: Tensor, gram: Tensor) -> Tensor:
    """tr(D G D^T) with its gradient 2 D G, for one matrix product where autograd would take two.

    Args:
        D: [m, d], may require a gradient.
        gram: G [d, d], symmetric.

    Example:
        >>> D = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> value = quadratic(D, torch.diag(torch.tensor([1.0, 3.0])))
        >>> value.backward()
        >>> value.item(), D.grad.tolist()
        (13.0, [[2.0, 12.0]])
    """
    linear = ((D.detach() @ gram) * D).sum()
    return 2 * linear - linear.detach()


Objective = tuple[DataLoader, Callable[[Any, Batch], Tensor], Callable[[nn.Module], dict[str, float]]]


def _on_gram(layer: QuantizedSite, target: Tensor, gram: Tensor) -> Objective:
    energy = quadratic(target, gram).clamp_min(torch.finfo(torch.float32).tiny)

    def loss(model: Any, batch: Batch) -> Tensor:
        return quadratic(target - layer.weight, gram) / energy  # nothing passes through the model's forward

    def evaluate(model: Any) -> dict[str, float]:
        return {"error": read(loss(model, ()))}

    nothing: Any = [()]  # one empty batch per epoch: every update sees all there is
    return DataLoader(nothing, batch_size=None), loss, evaluate


def _on_samples(cache: InputSamples, samples: int, seed: int) -> Objective:
    x, y = cache.x.float(), cache.y.float()
    y = F.relu(y) if cache.rectified else y
    energy = y.square().mean().clamp_min(torch.finfo(torch.float32).tiny)

    def squares(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        output = layer(x)
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
    """Train a quantised site towards the outputs of the original one; the best iterate on all the data is kept.

    Args:
        layer: what is trained, in place; left in evaluation mode.
        stats: with a second moment, for weights alone; or `InputSamples`.
        recipe: how long.
        target: the weight W to stay close to [out, in], for the objective with the second moment.
        samples: cached samples per batch.
        parameters: groups with learning rates of their own.
        penalty: added to the loss while training, a function of the layer.
        after_step: hooks of the loop.

    Returns:
        "before" and "after": the objective on all the data, before and after.

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
    return {"before": errors[0], "after": min(errors)}
