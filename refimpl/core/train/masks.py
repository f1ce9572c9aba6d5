"""Training with zeros in place: a mask beside a weight, the product in the forward pass.

A masked layer computes with M * W. The gradient goes through the product, so it is zero where the mask is, and the
stored W keeps what it held: a weight that was masked can come back with its value. Which weights to mask, and when,
is the business of a pruning method.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from refimpl.core.compress.sites import is_conv1d, unfuse_experts
from refimpl.core.device import read
from refimpl.core.errors import OptionError
from refimpl.core.layers import PackedLinear, parse_pattern
from refimpl.core.layers.conv import Geometry, PackedConv2d


class MaskedWeight(nn.Module):
    """The parametrization ``W -> M * W``.

    Args:
        weight: what is masked; any shape of two or more dimensions.
        transposed: the weight is stored input first (Conv1D of GPT-2, some fused experts).
        fused: the first dimension counts experts, [E, out, in].

    Attributes:
        mask: bool, the shape of the weight; True where it is live. All True at first.

    Example:
        >>> masked = MaskedWeight(torch.ones(1, 2))
        >>> _ = masked.mask.copy_(torch.tensor([[True, False]]))
        >>> W = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> (masked(W) * torch.tensor([[5.0, 5.0]])).sum().backward()
        >>> masked(W).tolist(), W.grad.tolist()
        ([[3.0, 0.0]], [[5.0, 0.0]])
    """

    mask: Tensor

    def __init__(self, weight: Tensor, transposed: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.transposed, self.fused = transposed, fused
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Rows of outputs and columns of inputs: [out, in], [out, in * k * k] for a convolution, [E * out, in] for
        fused experts. A view where the layout allows it."""
        weight = weight.transpose(-1, -2) if self.transposed else weight
        return weight.flatten(0, 1) if self.fused else weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        shape = self.mask.transpose(-1, -2).shape if self.transposed else self.mask.shape
        weight = matrix.reshape(shape)
        return weight.transpose(-1, -2) if self.transposed else weight


def _layouts(module: nn.Module) -> dict[str, tuple[bool, bool]]:
    """The weight matrices a module owns: name, and whether it is stored input first, and fused."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)):
        return {"weight": (False, False)}
    if is_conv1d(module):
        return {"weight": (True, False)}
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return {name: (False, False) for name, weight in own.items() if weight.dim() == 2}
    if "Expert" in type(module).__name__:
        first = bool(getattr(module, "is_transposed", False))
        return {name: (first, True) for name, weight in own.items() if weight.dim() == 3}
    return {}


def weight_matrices(model: nn.Module, targets: str | None = None) -> dict[str, nn.Parameter]:
    """The weights that `mask_weights` would mask, by name; tied weights are listed once.

    Args:
        model, targets: as in `mask_weights`.

    Raises:
        OptionError: as `mask_weights`.

    Example:
        >>> {name: list(W.shape) for name, W in weight_matrices(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2))).items()}
        {'0.weight': [3, 4], '1.weight_ih_l0': [8, 3], '1.weight_hh_l0': [8, 2]}
    """
    if find_masks(model):
        raise OptionError("model: its weights are masked already; call refimpl.core.train.masks.bake(model) first")
    found = _named_matrices(model)
    chosen = found
    if targets is not None:
        try:
            chosen = {name: weight for name, weight in found.items() if re.search(targets, name)}
        except re.error as error:
            raise OptionError(f"targets={targets!r} is not a regular expression: {error}") from error
    if not chosen:
        raise OptionError(
            f"targets={targets!r} matches no weight matrix; names look like {next(iter(found))!r}"
            if found
            else f"model={type(model).__name__}: found no weight matrix to mask (packed layers cannot be masked)"
        )
    once: dict[int, tuple[str, nn.Parameter]] = {}
    for name, weight in chosen.items():
        owner, _, attribute = name.rpartition(".")
        if parametrize.is_parametrized(model.get_submodule(owner), attribute):
            raise OptionError(
                f"model: {name!r} is parametrised (weight norm or the like); remove that with "
                "torch.nn.utils.parametrize.remove_parametrizations, or leave it out with targets="
            )
        if hasattr(weight, "full_tensor"):
            raise OptionError(
                f"model: {name!r} is sharded, and its mask needs the whole tensor; train with DistributedDataParallel"
            )
        once.setdefault(id(weight), (name, weight))
    return dict(once.values())


def _named_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{attribute}" if name else attribute: getattr(module, attribute)
        for name, module in model.named_modules()
        for attribute in _layouts(module)
    }


def mask_weights(model: nn.Module, targets: str | None = None) -> dict[str, MaskedWeight]:
    """Put a mask of ones over the weight matrices of `model`, in place.

    These are the weights of nn.Linear, Conv1D (GPT-2), nn.Conv1d to 3d, nn.Embedding, nn.LSTM and its kin,
    nn.MultiheadAttention, and fused experts. Biases, norms and whatever else a model holds stay as they are. Tied
    weights get one mask.

    The parameters themselves stay the same objects, so an optimiser may exist already; they are now called
    ``<module>.parametrizations.<weight>.original``, and ``state_dict`` holds the mask beside them. Until `bake`, save
    with ``state_dict``: a folder written by ``save_pretrained`` would have these names.

    Args:
        model: any module. Masks are per tensor: it may be wrapped in DistributedDataParallel afterwards.
        targets: a regular expression searched in the weight's name ("lstm.weight_hh_l0"); None takes all.

    Returns:
        The masks by the name of the weight, in the order of the model.

    Raises:
        OptionError: masked already, sharded or otherwise parametrised weights, or `targets` matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.LSTM(3, 2))
        >>> list(mask_weights(model))
        ['0.weight', '2.weight_ih_l0', '2.weight_hh_l0']
    """
    names = {id(weight): name for name, weight in weight_matrices(model, targets).items()}
    masks: dict[str, MaskedWeight] = {}
    for place, weight in _named_matrices(model).items():
        if id(weight) not in names:
            continue
        owner, _, attribute = place.rpartition(".")
        module = model.get_submodule(owner)
        name = names[id(weight)]
        if name not in masks:
            masks[name] = MaskedWeight(weight, *_layouts(module)[attribute])
        # unsafe only skips a trial run of the product, which keeps dtype and shape
        parametrize.register_parametrization(module, attribute, masks[name], unsafe=True)
        if isinstance(module, nn.RNNBase):
            _read_weights_afresh(module)
    return masks


def _read_weights_afresh(module: nn.RNNBase) -> None:
    """Make an LSTM's list of weights the masked ones.

    PyTorch keeps a list of the tensors the module was built with, which would go on unmasked. A parametrised module has
    a class of its own, so a property there can stand for the list: always up to date, and nothing to copy or to move.
    """
    vars(module).pop("_flat_weights", None)
    kind: Any = type(module)
    kind._flat_weights = property(
        lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda self, value: None
    )


def find_masks(model: nn.Module) -> dict[str, MaskedWeight]:
    """The masks of a model, by the name of the weight; tied weights are listed once.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> masks = mask_weights(model)
        >>> find_masks(model)["0.weight"] is masks["0.weight"]
        True
    """
    found: dict[int, tuple[str, MaskedWeight]] = {}
    for name, module in model.named_modules():
        for attribute, chain in _chains(module):
            full = f"{name}.{attribute}" if name else attribute
            found.setdefault(id(chain[0]), (full, cast(MaskedWeight, chain[0])))
    return dict(found.values())


def stored_weight(model: nn.Module, name: str) -> nn.Parameter:
    """The stored, unmasked W of a masked weight: what the optimiser moves, and what a method ranks.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> masks = mask_weights(model)
        >>> _ = masks["0.weight"].mask.fill_(False)
        >>> bool(model[0].weight.any()), bool(stored_weight(model, "0.weight").any())
        (False, True)
    """
    owner, _, attribute = name.rpartition(".")
    return cast(Any, model.get_submodule(owner)).parametrizations[attribute].original


def _chains(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Parametrisations of this module's own tensors that begin with a mask."""
    all_chains = cast("nn.ModuleDict", getattr(module, "parametrizations", {}))
    return [
        (attribute, cast(nn.ModuleList, chain))
        for attribute, chain in all_chains.items()
        if len(cast(nn.ModuleList, chain)) and isinstance(cast(nn.ModuleList, chain)[0], MaskedWeight)
    ]


@torch.no_grad()
def bake(model: nn.Module) -> dict[str, Tensor]:
    """Make M * W the weights, and forget the masks: an ordinary model with zeros in it.

    Returns:
        The masks by the name of the weight, for `pack` or to count; tied weights are listed once.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> _ = mask_weights(model)["0.weight"].mask.fill_(False)
        >>> _ = bake(model)
        >>> sorted(model.state_dict()), bool(model[0].weight.any())
        (['0.bias', '0.weight'], False)
    """
    masks = {name: masked.mask for name, masked in find_masks(model).items()}
    for module in list(model.modules()):
        for attribute, _ in _chains(module):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
            if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
                cast(Any, module)._init_flat_weights()
    return masks


def pack(model: nn.Module, pattern: str = "unstructured") -> list[str]:
    """`bake`, then replace masked nn.Linear, Conv1D and Conv2d by layers that store only what is live.

    Save the result with `refimpl.save`. Fused experts become one layer each. What has no packed form (embeddings,
    LSTMs, 1-D and 3-D convolutions, tied weights) stays an ordinary module with zeros in it, and a layer whose mask
    is all ones stays as it is.

    Args:
        model: with masks, from `mask_weights`.
        pattern: "unstructured" stores one bit per weight; "n:m" the positions of n in each m inputs, for masks that
            keep exactly these.

    Returns:
        Names of the packed layers.

    Raises:
        OptionError: no masks, or a mask that does not follow `pattern`; the model is not changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 2))
        >>> masks = mask_weights(model)
        >>> _ = masks["0.weight"].mask[:, 4:].fill_(False)
        >>> pack(model), model[0]
        (['0'], PackedLinear(16 -> 2, unstructured sparse))
    """
    found = find_masks(model)
    if not found:
        raise OptionError("model: it has no masks; nothing to pack")
    structure = parse_pattern(pattern)
    if structure is not None:
        for name, masked in found.items():
            _check_structure(name, masked.to_matrix(masked.mask), *structure)
    masks = bake(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners[id(weight)] = owners.get(id(weight), 0) + 1
    packed = []
    for name, mask in masks.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if read(mask.all()) or owners[id(getattr(module, attribute))] > 1:
            continue
        if "Expert" in type(module).__name__ and mask.dim() == 3:
            packed += [(f"{owner}.{index}.{attribute}", mask[index]) for index in range(len(mask))]
        else:
            packed.append((owner, mask))
    if any(mask.dim() == 3 for mask in masks.values()):
        unfuse_experts(model)
    done = []
    for name, mask in packed:
        if not name:
            continue  # the model itself: there is nowhere to put another layer
        layer = _packed(model.get_submodule(name), mask, pattern)
        if layer is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
            done.append(name)
    return done


def _check_structure(name: str, mask: Tensor, n: int, m: int) -> None:
    if read(mask.all()):
        return
    if mask.shape[1] % m or read((mask.unflatten(1, (-1, m)).sum(-1) != n).any()):
        raise OptionError(
            f"pattern='{n}:{m}': the mask of {name!r} does not keep {n} of every {m} inputs; "
            "use pattern='unstructured', or prune to that structure"
        )


def _packed(module: nn.Module, mask: Tensor, pattern: str) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return PackedLinear(values=module.weight.detach(), mask=mask, pattern=pattern, bias=module.bias)
    if is_conv1d(module):
        W, bias = cast(Tensor, module.weight).detach().T, cast("Tensor | None", module.bias)
        return PackedLinear(values=W, mask=mask.T, pattern=pattern, bias=bias)
    if isinstance(module, nn.Conv2d):
        W = module.weight.detach().flatten(1)
        kernel = PackedLinear(values=W, mask=mask.flatten(1), pattern=pattern, bias=module.bias)
        return PackedConv2d(kernel, Geometry.of(module))
    return None
