"""Cost and accuracy of a classifier, image by image.

Means are taken last: an interval over images needs a score for each image, and two models are compared on the same
images. Bytes come from `refimpl.lab.measure.metrics.footprint`; this module counts the arithmetic.

The classifier bench draws what `score_rows` yields; its docstring is the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from refimpl.core.arguments import checked
from refimpl.core.compress.sites import is_conv1d
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import CompressedLayer
from refimpl.lab.data.images import ImageSet
from refimpl.lab.study.study import Row


@dataclass(frozen=True)
class Scores:
    """How a model did on each image; n images, K classes, all on the CPU.

    Attributes:
        loss: float64 ``[n]``, cross-entropy in nats.
        correct: bool ``[n]``, whether the likeliest class is the label.
        logits: float32 ``[n, K]``.
        units: name of each image.
    """

    loss: Tensor
    correct: Tensor
    logits: Tensor
    units: list[str]

    @property
    def accuracy(self) -> float:
        """Share of images that are right, 0 to 1."""
        return float(self.correct.double().mean())


@checked()
def classify(model: nn.Module, images: ImageSet, batch_size: int = 250, progress: bool = True) -> Scores:
    """Score every image.

    Args:
        model: maps float pixels ``[b, C, H, W]`` to logits ``[b, K]``, or to an output that has ``.logits``, as the
            image classifiers of transformers do. On any device, in any dtype; run in evaluation mode, left as found.
        images: from `refimpl.lab.data.images`.
        batch_size: images per forward pass.
        progress: show a bar if this takes longer than two seconds.

    Raises:
        CalibrationError: no images, images of a shape the model was not made for, a label that is no class of the
            model, or logits that are not finite (the message names the image).

    Example:
        >>> from refimpl.lab.models.classifiers import resnet
        >>> from refimpl.lab.data.images import images
        >>> scores = classify(resnet(image_size=32), images("digits", "validation").take(20))
        >>> scores.loss.shape, scores.logits.shape, 0 <= scores.accuracy <= 1
        (torch.Size([20]), torch.Size([20, 10]), True)
    """
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}; it must be at least 1")
    _check_pixels(model, images.pixels)
    found = []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            tqdm(total=len(images), desc="classify", unit="image", delay=2, leave=False, disable=not progress) as bar,
        ):
            for batch in images.pixels.split(batch_size):
                logits = _logits(model(_like_weights(model, batch)))
                _check_labels(images.labels, logits.shape[1])  # all labels, before the remaining batches are computed
                found.append(logits.float().cpu())
                bar.update(len(batch))
    finally:
        for module in training:  # one by one: a caller may keep some modules in eval mode
            module.training = True
    logits = torch.cat(found)
    finite = logits.isfinite().all(1)
    if not finite.all():
        bad = images.units[int((~finite).nonzero()[0])]
        raise CalibrationError(
            f"the logits of image {bad!r} are not finite; look for NaN in the weights or use a wider dtype"
        )
    loss = F.cross_entropy(logits.double(), images.labels, reduction="none")
    return Scores(loss, logits.argmax(1) == images.labels, logits, list(images.units))


@checked()
def kl(scores: Scores, reference: Scores) -> Tensor:
    """KL(reference || model) of each image in nats: how far the predicted distribution has moved, right or wrong.

    Returns:
        float64 ``[n]``, not negative up to rounding.

    Raises:
        OptionError: the two were measured on different images, or have different numbers of classes.

    Example:
        >>> one = Scores(torch.zeros(1), torch.ones(1).bool(), torch.tensor([[0.0, 0.0]]), ["a"])
        >>> other = Scores(torch.zeros(1), torch.ones(1).bool(), torch.tensor([[1.0, 0.0]]), ["a"])
        >>> kl(other, one).item() > 0, kl(one, one).item()
        (True, 0.0)
    """
    if scores.units != reference.units or scores.logits.shape != reference.logits.shape:
        raise OptionError(
            f"scores and reference have logits of shape {list(scores.logits.shape)} and "
            f"{list(reference.logits.shape)}, or are of different images; classify the same images with both models"
        )
    p, q = (s.logits.double().log_softmax(1) for s in (reference, scores))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


@checked()
def cross_entropy_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in nats of one batch, for `refimpl.core.train.loop.train`.

    Args:
        model: see `classify`.
        batch: pixels ``[b, C, H, W]`` and labels ``[b]``.

    Raises:
        CalibrationError: a label that is no class of the model.

    Example:
        >>> from refimpl.lab.models.classifiers import resnet
        >>> cross_entropy_loss(resnet(), (torch.zeros(2, 1, 28, 28), torch.tensor([3, 10])))
        Traceback (most recent call last):
        refimpl.core.errors.CalibrationError: labels[1] is 10, but the model has 10 classes, 0 to 9; \
give it num_labels=11 or mend the labels
    """
    pixels, labels = batch
    logits = _logits(model(pixels))
    if labels.device.type == "cpu":  # a GPU would have to be waited for at every step, and asserts by itself
        _check_labels(labels, logits.shape[1])
    return F.cross_entropy(logits.float(), labels)


@checked()
def flops(model: nn.Module, example: Tensor | ImageSet) -> dict[str, int]:
    """Floating-point operations of one forward pass per image, by layer: two for each multiply-add with a weight.

    Counted are linear layers and convolutions, compressed or not: number of weights times the positions they are
    applied at. Of a sparse layer only the stored weights count, of a dense one only those that are not zero: this is
    what an implementation that skips every zero would compute, and no promise that yours does. Of a low-rank path the
    factors count. Left out is what no method here changes: attention between tokens, norms, activations, biases. Codes
    of few bits cost as much as floats; for those see `bit_operations`.

    Args:
        model: any module of the above layers; meta tensors do not work, it is run once.
        example: images ``[n, C, H, W]``; the first is used.

    Returns:
        Operations by module name, in the order of the modules. `sum(....values())` is the model.

    Raises:
        OptionError: no such layer was run.

    Example:
        >>> from refimpl.lab.models.classifiers import resnet
        >>> found = flops(resnet(), torch.zeros(1, 1, 28, 28))
        >>> found["resnet.embedder.embedder.convolution"]   # 7x7 kernels, 16 of them, at 14x14 positions
        307328
    """
    layers, positions = _positions(model, example)
    return {name: 2 * positions[name] * sum(n for n, _, _ in _products(layers[name], 0)) for name in positions}


@checked()
def bit_operations(model: nn.Module, example: Tensor | ImageSet) -> dict[str, int]:
    """The same count, each multiply-add times bits of the weight times bits of the input, by layer.

    A multiplier of b1 by b2 bits takes about b1 * b2 gates, which makes this the usual measure of integer arithmetic.
    Inputs have the bits of the layer's input quantiser, else those of the model's dtype; weights those of their codes,
    else of their dtype.

    Args:
        model, example: see `flops`.

    Example:
        >>> from refimpl.lab.models.classifiers import resnet
        >>> found = bit_operations(resnet(), torch.zeros(1, 1, 28, 28))
        >>> found["classifier.1"] == 640 * 32 * 32
        True
    """
    layers, positions = _positions(model, example)
    width = 8 * _like_weights(model, torch.zeros(1)).element_size()
    return {
        name: positions[name] * sum(n * weight * given for n, weight, given in _products(layers[name], width))
        for name in positions
    }


@checked()
def score_rows(scores: Scores, *, nbytes: int, flops: float, bit_operations: float | None = None) -> Iterator[Row]:
    """A classifier as the rows that the classifier bench reads.

    For each image two metrics, unit the image's name: "correct" (0 or 1) and "loss" (nats). For the arm, unit "":
    "bytes", "flops" (per image) and, if given, "bit_operations" (per image). No row carries a cost: a classifier has
    two, and they are metrics. The bench expects the condition "<dataset> <model>", e.g. "mnist resnet" or "digits vit".
    The arm is "dense" for the model that everything is compared with, else "<method> <label>" split at the first space:
    the method decides shape and colour on the chart (at most seven beside "dense" can be distinguished), the label
    distinguishes its points, e.g. "cubic 94%". Arms trained with several seeds are recorded under each seed.

    Args:
        scores: on the test split.
        nbytes: `refimpl.lab.measure.metrics.footprint(model).bytes`.
        flops: sum of `flops(model, example)`.
        bit_operations: sum of `bit_operations(model, example)`, where codes of few bits are the point.

    Example:
        >>> one = Scores(torch.tensor([0.5]), torch.tensor([True]), torch.zeros(1, 10), ["test 0"])
        >>> [row[:3] for row in score_rows(one, nbytes=1000, flops=2000)]
        [('correct', 1.0, 'test 0'), ('loss', 0.5, 'test 0'), ('bytes', 1000.0, ''), ('flops', 2000.0, '')]
    """
    for metric, values in (("correct", scores.correct), ("loss", scores.loss)):
        for unit, value in zip(scores.units, values.tolist(), strict=True):
            yield Row(metric, float(value), unit)
    for metric, cost in {"bytes": nbytes, "flops": flops, "bit_operations": bit_operations}.items():
        if cost is not None:
            yield Row(metric, float(cost))


def _positions(model: nn.Module, example: Tensor | ImageSet) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Layers with weights, and how often each is applied to one image."""
    pixels = example.pixels if isinstance(example, ImageSet) else example
    _check_pixels(model, pixels)
    positions: dict[str, int] = {}
    layers = dict(_weight_layers(model))

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            positions[name] = positions.get(name, 0) + output.numel() // _outputs(module)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(_like_weights(model, pixels[:1]))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if not positions:
        raise OptionError("model: its forward pass ran no linear layer and no convolution: nothing to count")
    return layers, {name: positions[name] for name in layers if name in positions}


def _weight_layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Outermost layers that multiply by weights: a compressed layer counts what is inside it itself."""
    if isinstance(module, (nn.Linear, nn.Conv2d, CompressedLayer)) or is_conv1d(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _weight_layers(child, f"{name}.{child_name}" if name else child_name)


def _outputs(layer: nn.Module) -> int:
    for attribute in ("out_channels", "out_features", "nf"):
        if hasattr(layer, attribute):
            return int(cast(int, getattr(layer, attribute)))
    raise AssertionError(f"{type(layer).__name__} has no number of outputs")


def _products(layer: nn.Module, width: int) -> Iterator[tuple[int, int, int]]:
    """Weights that one position of the output is made from, their bits, and the bits of what they multiply."""
    inner = [child for child in layer.children() if isinstance(child, CompressedLayer)]
    if inner:
        width = getattr(getattr(layer, "quantizer", None), "bits", width)
        for child in inner:
            yield from _products(child, width)
        return
    weight = layer.to_dense() if isinstance(layer, CompressedLayer) else cast(Tensor, layer.weight)
    # of a packed layer every stored value is multiplied, also one whose code happens to mean zero
    count = int(cast(int, getattr(layer, "nonzeros", None) or torch.count_nonzero(weight)))
    yield count, cast(int, getattr(layer, "bits", None) or 8 * weight.element_size()), width


def _like_weights(model: nn.Module, x: Tensor) -> Tensor:
    """`x` where the model is and in its dtype; a model that is packed to the last bias takes fp32."""
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return x.to(tensors[0].device if tensors else x.device, dtypes[0] if dtypes else torch.float32)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _check_pixels(model: nn.Module, pixels: Tensor) -> None:
    shape = list(pixels.shape)
    if pixels.dim() != 4 or not len(pixels) or not pixels.is_floating_point():
        raise CalibrationError(
            f"images: pixels are {pixels.dtype} {shape}; they must be float [n, C, H, W] with at least one image"
        )
    config = getattr(model, "config", None)
    channels, side = (getattr(config, name, None) for name in ("num_channels", "image_size"))
    if channels is not None and shape[1] != channels:
        raise CalibrationError(f"images have {shape[1]} channels, the model takes {channels}: {shape}")
    sides = [side, side] if isinstance(side, int) else list(side or ())
    if sides and shape[2:] != sides:
        raise CalibrationError(
            f"images are {shape[2]}x{shape[3]} pixels, but the model was made for {sides[0]}x{sides[1]}: take the "
            "images it was trained on, or resize them"
        )


def _check_labels(labels: Tensor, classes: int) -> None:
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise CalibrationError(
            f"labels[{row}] is {int(labels[row])}, but the model has {classes} classes, 0 to {classes - 1}; "
            f"give it num_labels={int(labels.max()) + 1} or mend the labels"
        )
