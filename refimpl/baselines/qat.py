"""Quantisation-aware fine-tuning: the whole quantised network is trained end to end towards the float outputs.

All weights, biases and ranges are trained at once with straight-through gradients to minimise the divergence of the
quantised network's class probabilities from the float network's (the distillation loss of Hinton et al., 2015, arXiv 1503.02531).
With much data this is the strongest way to quantise; with few images it over-fits them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refimpl.core.compress.inputs import collect
from refimpl.core.compress.reconstruct import QuantizedSite, scaled_rates
from refimpl.core.compress.sites import find_sites
from refimpl.core.compress.whole import run
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import CompressedLayer
from refimpl.core.train.loop import History, Recipe, batches, train


def logits_of(model: nn.Module, samples: Tensor) -> Tensor:
    """Logits of one batch in fp32, from a model that returns a tensor or an object with ``.logits``.

    Example:
        >>> logits_of(nn.Linear(3, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    output = run(model, samples)
    return (output if isinstance(output, Tensor) else output.logits).float()


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) in nats, mean over samples.

    Args:
        logits, target: [n, classes].

    Example:
        >>> divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])).item()
        0.0
    """
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)


@torch.no_grad()
def all_logits(model: nn.Module, samples: Tensor, batch_size: int = 100) -> Tensor:
    """Logits of all samples in evaluation mode, [n, classes].

    Example:
        >>> all_logits(nn.Linear(3, 2), torch.zeros(5, 3), batch_size=2).shape
        torch.Size([5, 2])
    """
    training = model.training
    model.eval()
    found = torch.cat([logits_of(model, batch) for batch in samples.split(batch_size)])
    model.train(training)
    return found


def towards(
    model: nn.Module,
    samples: Tensor,
    target: Tensor,
    recipe: Recipe,
    *,
    batch_size: int,
    parameters: list[dict[str, Any]] | None = None,
    keep_best: bool,
    progress: bool,
) -> History:
    """Train a model towards given logits on given samples.

    Args:
        model: trained in place, all but its quantisers in evaluation mode: batch norms and dropout stay inactive.
        samples: [n, ...].
        target: logits of the float network, [n, classes].
        recipe, parameters: see `refimpl.core.train.loop.train`.
        batch_size: samples per update.
        keep_best: keep the iterate with the least divergence on these samples.
        progress: show a bar.

    Raises:
        CalibrationError: fewer samples than a batch, or logits that are not finite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(3, 2), torch.randn(8, 3)
        >>> target = x[:, :2]
        >>> history = towards(model, x, target, Recipe(50, lr=0.1), batch_size=4, keep_best=True, progress=False)
        >>> history.evaluations[0]["divergence"] > history.evaluations[-1]["divergence"]
        True
    """
    if len(samples) < batch_size:
        raise CalibrationError(
            f"calibration: {len(samples)} samples are fewer than one batch, batch_size={batch_size}; pass more of "
            f"them, or batch_size={len(samples)}"
        )
    if not torch.isfinite(target).all():
        raise CalibrationError("calibration: the float network's logits are not finite; check model and samples")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        for module in model.modules():
            module.training = isinstance(module, QuantizedSite)
        return divergence(logits_of(model, batch[0]), batch[1])

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"divergence": float(divergence(all_logits(model, samples), target))}

    return train(
        model,
        batches(samples, target, batch_size=batch_size, seed=recipe.seed),
        loss,
        recipe,
        parameters=parameters,
        evaluate=evaluate,
        evaluate_every=max(1, recipe.steps // 10),
        keep_best="divergence" if keep_best else None,
        progress=progress,
    )


@torch.no_grad()
def fine_tune(
    model: nn.Module,
    samples: Any,
    bits: int,
    activation_bits: int,
    recipe: Recipe,
    *,
    batch_size: int = 50,
    keep_best: bool = True,
    progress: bool = True,
) -> History:
    """Quantise every site of a model and train all of it towards the outputs of the float model, in place.

    Args:
        model: a float classifier (see `refimpl.core.compress.sites.has_blocks`), without batch norms: fold them first.
        samples: calibration samples [n, ...], or an object with them as ``.pixels``.
        bits, activation_bits: 2 to 8; weights have a grid per output channel, inputs one per tensor.
        recipe: of the training; its rate is relative to each layer (`refimpl.core.compress.reconstruct.scaled_rates`).
        batch_size: samples per update.
        keep_best: keep the iterate with the least divergence on the calibration samples.
        progress: show a bar.

    Returns:
        The history. The model ends with packed layers, as `compress` leaves them.

    Raises:
        OptionError: an already compressed model, or bits out of range.
        CalibrationError: fewer samples than a batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> images = torch.randn(20, 1, 5, 5)
        >>> history = fine_tune(model, images, 4, 4, Recipe(5, lr=1e-2), batch_size=10, progress=False)
        >>> model[3].base.bits, model[3].quantizer.bits
        (4, 4)
    """
    for name, value in (("bits", bits), ("activation_bits", activation_bits)):
        if not 2 <= value <= 8:
            raise OptionError(f"{name}={value}: use 2 to 8")
    pixels: Tensor = getattr(samples, "pixels", samples)
    sites = find_sites(model)
    for site in sites:
        if isinstance(site.placed, CompressedLayer):
            raise OptionError(f"model: {site.name!r} is {site.placed} already; start from the float model")
    target = all_logits(model, pixels)
    with collect(sites, {"range"}) as stats:
        all_logits(model, pixels)
    trained = {}
    for site in sites:
        inputs = (activation_bits, stats[site.name].low, stats[site.name].high)
        trained[site.name] = QuantizedSite(site, bits, site.in_features, inputs=inputs)
    dense = {site.name: site.placed for site in sites}
    try:
        for site in sites:
            setattr(site.parent, site.attribute, trained[site.name])
        groups = [group for layer in trained.values() for group in scaled_rates(layer, recipe.lr)]
        with torch.enable_grad():
            history = towards(
                model,
                pixels,
                target,
                recipe,
                batch_size=batch_size,
                keep_best=keep_best,
                parameters=groups,
                progress=progress,
            )
    except BaseException:
        for site in sites:
            setattr(site.parent, site.attribute, dense[site.name])
        raise
    for site in sites:
        setattr(site.parent, site.attribute, dense[site.name])
        site.replace(trained[site.name].eval().packed())
    return history
