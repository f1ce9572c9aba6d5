"""Batch norms folded into the convolutions before them, put back for new statistics, and folded again.

In evaluation mode a batch norm multiplies each channel by a number and adds another; the convolution that feeds it can
absorb both. Folding alone would lose the statistics of the channel: mean beta and variance gamma^2. `FoldedNorms` keeps
them, so that a batch norm can be put back as the identity, measure the network as it is after compression, and restore
the old mean and variance when it is folded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from refimpl.core.compress.flow import Consumers
from refimpl.core.compress.whole import run
from refimpl.core.errors import OptionError
from refimpl.core.layers import (
    CompensatedLinear,
    Factor,
    LowRankLinear,
    PackedConv2d,
    PackedLinear,
    QuantizedInput,
    parse_pattern,
)


@dataclass
class Norm:
    """The constants of one folded batch norm.

    Attributes:
        name: of its place in the model, where an `nn.Identity` is now.
        gamma, beta: its affine weight and bias [channels] (1 and 0 if it had none).
        eps, momentum: its constants.
    """

    name: str
    gamma: Tensor
    beta: Tensor
    eps: float
    momentum: float | None


@dataclass
class FoldedNorms:
    """The batch norms `fold_batch_norms` folded.

    Attributes:
        norms: by name of the convolution.
        left: batch norms that stay as they are, by name, with the reason.
    """

    norms: dict[str, Norm] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def reinsert(self, model: nn.Module) -> None:
        """Put a batch norm that changes nothing yet after each folded convolution, compressed or not.

        Its running mean is beta, its running variance gamma^2, its weight sqrt(gamma^2 + eps), its bias beta. Run the
        calibration samples in training mode to give it the statistics of the network as it is now, then `refold`.

        Raises:
            OptionError: this is another model, or the batch norms are there already.
        """
        for conv, norm in self.norms.items():
            place = _get(model, norm.name)
            if not isinstance(place, nn.Identity):
                raise OptionError(
                    f"model: {norm.name!r} is {type(place).__name__}, not the nn.Identity that folding left after "
                    f"{conv!r}; pass the folded model, and reinsert only once"
                )
        for norm in self.norms.values():
            place = _get(model, norm.name)
            gamma, beta = norm.gamma, norm.beta
            batch_norm = nn.BatchNorm2d(len(gamma), norm.eps, norm.momentum, device="meta")
            batch_norm.weight = nn.Parameter((gamma.square() + norm.eps).sqrt(), requires_grad=False)
            batch_norm.bias = nn.Parameter(beta.clone(), requires_grad=False)
            batch_norm.running_mean, batch_norm.running_var = beta.clone(), gamma.square()
            batch_norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=gamma.device)
            _set(model, norm.name, batch_norm.train(place.training))

    @torch.no_grad()
    def refold(self, model: nn.Module) -> None:
        """Fold the batch norms that `reinsert` put in, with the statistics they have now.

        A quantised kernel keeps its codes: only the scales of its grid change (stored in fp32 from then on, so that
        nothing is rounded).

        Raises:
            OptionError: the batch norms are not there.
        """
        for conv, norm in self.norms.items():
            place = _get(model, norm.name)
            if not isinstance(place, nn.BatchNorm2d):
                raise OptionError(
                    f"model: there is no batch norm at {norm.name!r}, after {conv!r}, to fold; reinsert first"
                )
        for conv, norm in self.norms.items():
            batch_norm = _get(model, norm.name)
            assert isinstance(batch_norm, nn.BatchNorm2d)
            rescale(_get(model, conv), *_affine(batch_norm))
            _set(model, norm.name, nn.Identity().train(batch_norm.training))


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Any) -> FoldedNorms:
    """Fold every batch norm that directly follows a convolution, in place; outputs in evaluation mode stay the same.

    Which batch norm follows which convolution is found in a forward pass: the tensor that enters the one must be the
    tensor that left the other, nothing else may use it, and both must be called once. Batch norms that do not qualify
    stay as they are and are listed in ``.left``.

    Args:
        model: any module with `nn.Conv2d` and `nn.BatchNorm2d`; its convolutions get a bias, its folded batch norms
            become `nn.Identity`.
        example: samples for one forward pass, [n, channels, height, width].

    Returns:
        The constants needed to put the batch norms back.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> x = torch.randn(2, 1, 5, 5)
        >>> before = model(x)
        >>> folded = fold_batch_norms(model, x)
        >>> model[1], folded.norms["0"].name, torch.allclose(model(x), before, atol=1e-6)
        (Identity(), '1', True)
    """
    feeds, left = fed_norms(model, example)
    folded = FoldedNorms(left=left)
    for conv, name in feeds.items():
        batch_norm = _get(model, name)
        assert isinstance(batch_norm, nn.BatchNorm2d) and batch_norm.running_var is not None
        ones = torch.ones_like(batch_norm.running_var)
        gamma = ones if batch_norm.weight is None else batch_norm.weight.detach().clone()
        beta = torch.zeros_like(ones) if batch_norm.bias is None else batch_norm.bias.detach().clone()
        folded.norms[conv] = Norm(name, gamma, beta, batch_norm.eps, batch_norm.momentum)
        rescale(_get(model, conv), *_affine(batch_norm))
        _set(model, name, nn.Identity().train(batch_norm.training))
    return folded


def fed_norms(model: nn.Module, example: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The batch norm that each convolution feeds, where folding is exact; and the reason why not for all others.

    Args:
        model: in evaluation mode or not; one forward pass on `example` is taken.
        example: as for `fold_batch_norms`.

    Example:
        >>> fed_norms(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), torch.zeros(1, 1, 5, 5))
        ({'0': '1'}, {})
    """
    names = {module: name for name, module in model.named_modules()}
    convs = [m for m in names if isinstance(m, (nn.Conv2d, PackedConv2d))]
    norms = [m for m in names if isinstance(m, nn.BatchNorm2d)]
    calls = dict.fromkeys(names, 0)
    outputs: dict[str, Tensor] = {}
    fed_by: dict[nn.Module, str | None] = dict.fromkeys(norms)
    consumers = Consumers()

    def left_conv(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls[module] += 1
        outputs[names[module]] = output
        consumers.watch(names[module], output)

    def enters_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        origin = consumers.origin(args[0])
        fed_by[module] = origin if origin is not None and outputs[origin] is args[0] else None

    handles = [m.register_forward_hook(left_conv) for m in convs]
    handles += [m.register_forward_pre_hook(enters_norm) for m in norms]
    try:
        with _evaluation(model), consumers:
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()

    feeds: dict[str, str] = {}
    left: dict[str, str] = {}
    for module in norms:
        conv = fed_by[module]
        source = None if conv is None else model.get_submodule(conv)
        if calls[module] != 1:
            reason = f"it is called {calls[module]} times"
        elif conv is None or source is None:
            reason = "no convolution directly before it"
        elif calls[source] != 1:
            reason = f"the convolution before it, {conv!r}, is called {calls[source]} times"
        elif list(fed_by.values()).count(conv) > 1 or not all("batch_norm" in op for op in consumers.found[conv]):
            reason = f"something else uses the output of {conv!r} too"
        elif module.running_var is None:
            reason = "it has no running statistics"
        elif is_parametrized(source):
            reason = f"the weight of {conv!r} is parametrised; make it a plain one first"
        else:
            feeds[conv] = names[module]
            continue
        left[names[module]] = reason
    return feeds, left


def _affine(batch_norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and shift [channels], fp32, of a batch norm in evaluation mode."""
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    factor = (batch_norm.running_var.float() + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        factor = factor * batch_norm.weight.float()
    shift = -batch_norm.running_mean.float() * factor
    return factor, shift if batch_norm.bias is None else shift + batch_norm.bias.float()


@singledispatch
def rescale(layer: nn.Module, factor: Tensor, shift: Tensor | None) -> None:
    """Make `layer` compute ``factor * y + shift`` instead of y, per output channel, by changing what it stores.

    Args:
        layer: a torch convolution, or any compressed layer of `refimpl.core.layers`.
        factor: fp32 [out].
        shift: fp32 [out]; None adds nothing.

    Raises:
        OptionError: a layer of another kind.

    Example:
        >>> conv = nn.Conv2d(1, 2, 1, bias=False)
        >>> x = torch.ones(1, 1, 1, 1)
        >>> before = conv(x)
        >>> rescale(conv, torch.tensor([2.0, 3.0]), torch.ones(2))
        >>> torch.allclose(conv(x).flatten(), before.flatten() * torch.tensor([2.0, 3.0]) + 1)
        True
    """
    raise OptionError(f"a batch norm cannot be folded into {type(layer).__name__}")


@rescale.register
def _(layer: nn.Conv2d, factor: Tensor, shift: Tensor | None) -> None:
    layer.weight = _scaled(layer.weight, factor)
    _shift_bias(layer, factor, shift)


@rescale.register
def _(layer: PackedLinear, factor: Tensor, shift: Tensor | None) -> None:
    if layer.bits is not None:
        layer.scale = layer.scale.float() * factor[:, None]
    elif (
        layer.pattern is not None and parse_pattern(layer.pattern) is None
    ):  # the kept values of all rows, one after another
        mask = layer.nonzero_mask()
        assert mask is not None
        per_value = factor[:, None].expand_as(mask)[mask]
        layer.values = (layer.values.float() * per_value).to(layer.values.dtype)
    else:
        layer.values = (layer.values.float() * factor[:, None]).to(layer.values.dtype)
    _shift_bias(layer, factor, shift)


@rescale.register
def _(layer: Factor, factor: Tensor, shift: Tensor | None) -> None:
    assert shift is None
    layer.weight = _scaled(layer.weight, factor)


@rescale.register
def _(layer: LowRankLinear, factor: Tensor, shift: Tensor | None) -> None:
    rescale(layer.B, factor, shift)


@rescale.register
def _(layer: CompensatedLinear, factor: Tensor, shift: Tensor | None) -> None:
    rescale(layer.base, factor, shift)
    rescale(layer.adapter, factor, None)


@rescale.register(PackedConv2d)
@rescale.register(QuantizedInput)
def _(layer: PackedConv2d | QuantizedInput, factor: Tensor, shift: Tensor | None) -> None:
    rescale(layer.base, factor, shift)


def _scaled(weight: Tensor, factor: Tensor) -> nn.Parameter:
    """A scaled copy as a new parameter, because the old one may be shared with another layer."""
    per_row = factor.view(-1, *[1] * (weight.dim() - 1))
    return nn.Parameter((weight.detach().float() * per_row).to(weight.dtype), weight.requires_grad)


def _shift_bias(layer: nn.Conv2d | PackedLinear, factor: Tensor, shift: Tensor | None) -> None:
    old = layer.bias
    bias = shift if old is None else old.detach().float() * factor + (0.0 if shift is None else shift)
    if bias is not None:
        dtype = layer.dtype if isinstance(layer, PackedLinear) else layer.weight.dtype
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=isinstance(layer, nn.Conv2d))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of the block, then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _get(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise OptionError(f"model: it has no {name!r}; pass the model whose batch norms were folded") from error


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
