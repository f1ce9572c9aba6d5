"""Steps 4 and 5: batch-norm tuning and bias tuning, which repair a quantised network without changing any weight code.

Quantised layers shift and shrink their outputs, and the errors add up over layers. Batch-norm tuning measures the new
mean mu and variance sigma^2 of every channel and restores the old ones, beta and gamma^2:

    y  ->  (y - mu) sqrt(gamma^2 + eps) / sqrt(sigma^2 + eps) + beta

which is again one factor and one shift per channel, absorbed by the scales and the bias of the convolution. Bias tuning
trains only biases, towards the float network's class probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from refimpl.baselines.qat import towards
from refimpl.core.compress.fold import FoldedNorms
from refimpl.core.compress.whole import run
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.train.loop import History, Recipe


@torch.no_grad()
def retune_batch_norms(
    model: nn.Module, folded: FoldedNorms, samples: Any, *, momentum: float | None = None, batch_size: int = 50
) -> None:
    """Give the outputs of every folded convolution the channel means and variances of the float network, in place.

    Args:
        model: with its batch norms folded, its convolutions compressed.
        folded: from `refimpl.core.compress.fold.fold_batch_norms` of the float model.
        samples: calibration samples [n, ...], or an object with them as ``.pixels``.
        momentum: None averages over all batches. A number is the weight of each new batch, as in the authors' code
            (0.1): after m batches the float statistics still have a weight of 0.9^m, 66 % after four.
        batch_size: samples per batch.

    Raises:
        OptionError: no folded batch norms, or those of another model.
        CalibrationError: fewer than 2 samples, which have no variance.

    Example:
        >>> from refimpl import RTN, compress
        >>> from refimpl.core.compress.fold import fold_batch_norms
        >>> model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        ...     nn.Linear(144, 10)).eval()
        >>> images = torch.randn(8, 1, 5, 5)
        >>> folded = fold_batch_norms(model, images)
        >>> _ = compress(model, RTN(2, None), progress=False)
        >>> codes = model[0].base.values.clone()
        >>> retune_batch_norms(model, folded, images)
        >>> torch.equal(model[0].base.values, codes)
        True
    """
    pixels: Tensor = getattr(samples, "pixels", samples)
    if not folded.norms:
        raise OptionError("folded: it holds no batch norms, so there are no statistics to tune in this model")
    if len(pixels) < 2:
        raise CalibrationError(f"calibration: {len(pixels)} samples have no variance; pass 2 or more")
    training = model.training
    # after its own batch norm a channel had mean beta and variance gamma^2: a norm with these statistics, weight
    # sqrt(gamma^2 + eps) and bias beta is the identity
    folded.reinsert(model)
    norms = [model.get_submodule(norm.name) for norm in folded.norms.values()]
    before = [(norm, norm.momentum) for norm in norms if isinstance(norm, nn.BatchNorm2d)]
    try:
        model.eval()
        for norm, _ in before:
            norm.train()  # mu and sigma^2 of the quantised network replace beta and gamma^2
            norm.momentum = momentum
        # batches of equal size: a last batch of one image would weigh as much as each of the others
        for batch in pixels.tensor_split(max(1, len(pixels) // batch_size)):
            run(model, batch)
    finally:
        for norm, old in before:
            norm.momentum = old
        model.train(training)
        # folding multiplies each channel by sqrt(gamma^2 + eps) / sqrt(sigma^2 + eps): the scales change, no code does
        folded.refold(model)


def tune_biases(
    model: nn.Module,
    samples: Any,
    target: Tensor,
    recipe: Recipe | None = None,
    *,
    batch_size: int = 50,
    keep_best: bool = True,
    progress: bool = True,
) -> History:
    """Train all biases, and nothing else, towards the float network's class probabilities, in place.

    The loss is KL(softmax(float logits) || softmax(quantised logits)), so no labels are needed.

    Args:
        model: a compressed classifier.
        samples: calibration samples [n, ...], or an object with them as ``.pixels``.
        target: the float network's logits on them, [n, classes] (`refimpl.baselines.qat.all_logits`).
        recipe: by default 200 updates of plain SGD, from 0.1 to 0 along a cosine. The authors' rates are 0.1, then 0.01,
            for a loss that is a mean over the C classes as well: 0.1 there moves biases as far as 0.1 / C does here.
        batch_size: samples per update.
        keep_best: keep the iterate with the least divergence on these samples.
        progress: show a bar.

    Raises:
        OptionError: the model has no biases.
        CalibrationError: fewer samples than a batch, or a target for other samples.

    Example:
        >>> from refimpl import RTN, compress
        >>> from refimpl.baselines.qat import all_logits
        >>> model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
        >>> images = torch.randn(20, 1, 5, 5)
        >>> target = all_logits(model, images)
        >>> _ = compress(model, RTN(2, None), progress=False)
        >>> history = tune_biases(model, images, target, Recipe(20, lr=0.1, optimizer="sgd"), batch_size=10)
        >>> history.evaluations[history.best // 2]["divergence"] <= history.evaluations[0]["divergence"]
        True
    """
    pixels: Tensor = getattr(samples, "pixels", samples)
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise OptionError(f"model={type(model).__name__}: it has no biases to tune (many language models have none)")
    if len(target) != len(pixels):
        raise CalibrationError(
            f"target: {len(target)} rows of logits for {len(pixels)} samples; compute it on the same samples"
        )
    recipe = recipe or Recipe(200, lr=0.1, optimizer="sgd", momentum=0.0)
    trainable = {id(p): p.requires_grad for p in model.parameters()}
    try:
        for p in model.parameters():
            p.requires_grad_(any(p is bias for bias in biases))
        with torch.enable_grad():
            return towards(
                model,
                pixels,
                target,
                recipe,
                batch_size=batch_size,
                keep_best=keep_best,
                parameters=[{"params": biases}],
                progress=progress,
            )
    finally:
        for p in model.parameters():
            p.requires_grad_(trainable[id(p)])
