"""The places where a model can be compressed: linear maps inside a language model's blocks, or all maps of other models.

A `Site` hides the ways a linear map is stored: `nn.Linear` ([out, in]), `Conv1D` of GPT-2 ([in, out]), experts fused
into one 3-D parameter, and `nn.Conv2d`, whose kernel is a matrix that is applied to patches. In a language model
embeddings, the head, norms and routers are not sites, so they stay as they are, tied or not. In a model without
decoder blocks, such as an image classifier, all linear maps and convolutions are sites.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refimpl.core.errors import OptionError
from refimpl.core.layers import CompressedLayer, Geometry, PackedConv2d

ROUTER_WIDTH = 16  # a map with fewer outputs is a router or a gate: few bytes to save, much accuracy to lose
_ROUTER = re.compile(r"(Router|Gate|Gating)$")  # class names of modules whose linear map chooses experts


class UnfusedExperts(nn.Module):
    """The experts of a mixture, one pair of `nn.Linear` each (child "0", "1", ...), instead of two 3-D parameters.

    The weights are views of the fused parameters, so building this costs no memory. With experts as ordinary
    linear maps every method, hook and file format works on them unchanged.

    Args:
        fused: a transformers experts module with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=2)
        >>> UnfusedExperts(MixtralExperts(config)).get_submodule("1.down_proj").weight.shape
        torch.Size([8, 4])
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.gate = cast(Any, type(fused))._apply_gate
        for name, value in vars(fused).items():  # what its gate may read: limits, factors
            if isinstance(value, (int, float, str)) and name[0] != "_" and name not in vars(self):
                setattr(self, name, value)
        self.act_fn = fused.act_fn
        self.num_experts = cast(Tensor, fused.down_proj).shape[0]
        for index in range(self.num_experts):
            expert = nn.Module()
            gate_up, down = (cast(Tensor, getattr(fused, name))[index] for name in ("gate_up_proj", "down_proj"))
            for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
                expert.add_module(name, linear)
            self.add_module(str(index), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Same contract as the fused module: hidden_states [T, H], top_k_index and top_k_weights [T, k]."""
        output = torch.zeros_like(hidden_states)
        # every expert runs, with no tokens if none chose it: no value is read back from the device
        for index in range(self.num_experts):
            expert = self.get_submodule(str(index))
            token, choice = torch.where(top_k_index == index)
            hidden = self.gate(self, expert.gate_up_proj(hidden_states[token]))  # type: ignore[operator]
            hidden = expert.down_proj(hidden) * top_k_weights[token, choice, None]  # type: ignore[operator]
            output.index_add_(0, token, hidden.to(output.dtype))
        return output


def _why_not_unfusable(module: nn.Module) -> str | None:
    """Why these fused experts cannot become linear maps, or None."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights):
        return "its parameters are not the pair gate_up_proj, down_proj"
    layout = {
        "is_transposed": False,
        "has_bias": False,
        "has_gate": True,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    for flag, wanted in layout.items():
        if getattr(module, flag, wanted) is not wanted:
            return f"{flag} is {not wanted}"
    return next((f"it has no {name}" for name in ("_apply_gate", "act_fn") if not hasattr(module, name)), None)


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module of `model` by `UnfusedExperts`, in place; return their names.

    Raises:
        OptionError: for an unknown layout of experts; names the module.

    Example:
        >>> unfuse_experts(nn.Linear(2, 2))
        []
    """
    names = []
    for name, module in _fused_experts(model).items():
        reason = _why_not_unfusable(module)
        if reason is not None:
            raise OptionError(
                f"model: the fused experts {name!r} ({type(module).__name__}) are not supported because {reason}; "
                "convert them to nn.Linear first"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, UnfusedExperts(module))
        names.append(name)
    return names


def _fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        and not is_linear(module)
        and any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    }


@contextmanager
def experts_put_back(model: nn.Module, always: bool) -> Iterator[None]:
    """Restore a model's fused experts when the block ends: if it fails, or with `always` in any case.

    Example:
        >>> with experts_put_back(nn.Linear(2, 2), always=True):
        ...     pass
    """
    fused = _fused_experts(model)
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            for name, module in fused.items():
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, module)


def _refuse_encoder_decoder(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise OptionError(f"model={type(model).__name__}: encoder-decoder models are not supported; use a decoder")


def _size(module: nn.Module) -> int:
    """The number of weights and buffers, those of compressed layers as if they were dense."""
    if isinstance(module, CompressedLayer):
        return module.in_features * module.out_features
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.numel() for tensor in own) + sum(_size(child) for child in module.children())


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks: the `nn.ModuleList` that holds most of the model's parameters, compressed or not.

    Raises:
        OptionError: an encoder-decoder, or no such list.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with torch.device("meta"):
        ...     model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=9))
        >>> find_blocks(model)[0]
        'transformer.h'
    """
    _refuse_encoder_decoder(model)
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = _size(module)
            if best is None or size > best[0]:  # strict, so that of equal ones the outermost wins
                best = (size, name, module)
    if best is None or best[0] == 0:
        raise OptionError(f"model={type(model).__name__}: found no nn.ModuleList of blocks to walk")
    return best[1], best[2]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear map that can be a site (`nn.Linear`, `Conv1D`, or already compressed).

    Example:
        >>> is_linear(nn.Linear(2, 2)), is_linear(nn.LayerNorm(2))
        (True, False)
    """
    return isinstance(module, (nn.Linear, CompressedLayer)) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is the Conv1D of GPT-2-like models, whose weight is [in, out].

    Example:
        >>> is_conv1d(nn.Linear(2, 2))
        False
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass
class Site:
    """One compressible linear map of a model; a convolution is one whose weight is its flattened kernel.

    Attributes:
        name: dotted path of the module in the model.
        block: index of the decoder block it belongs to; in a model without blocks, its own number.
        parent, attribute: the owner of the module and the name under which it has it, for replacing it.
        log: remarks of a method about this site (raised damping, ...).

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 2))
        >>> site = Site("0", 0, block, "0")
        >>> site.weight.shape, site.in_features
        (torch.Size([2, 4]), 4)
    """

    name: str
    block: int
    parent: nn.Module
    attribute: str
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def placed(self) -> nn.Module:
        """The module that the model calls at this place now."""
        return self.parent.get_submodule(self.attribute)

    @property
    def module(self) -> nn.Module:
        """The module with the weight: `placed`, or the layer of the kernel inside a compressed convolution."""
        placed = self.placed
        return placed.base if isinstance(placed, PackedConv2d) else placed

    @property
    def geometry(self) -> Geometry | None:
        """Stride, padding and the rest of a convolution; None for a linear layer."""
        placed = self.placed
        if isinstance(placed, PackedConv2d):
            return placed.geometry
        return Geometry.of(placed) if isinstance(placed, nn.Conv2d) else None

    @property
    def weight(self) -> Tensor:
        """The weight in use now, [out, in] for every kind of module; a view where possible.

        For a convolution it is the kernel flattened to [out, in_channels / groups * kernel height * kernel width].
        """
        module = self.module
        if isinstance(module, CompressedLayer):
            return module.to_dense()
        weight = cast(Tensor, module.weight).detach()
        return weight.T if is_conv1d(module) else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self._shape[0]

    @property
    def in_features(self) -> int:
        """Number of inputs, per patch for a convolution."""
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        module = self.module
        if isinstance(module, CompressedLayer):
            return module.out_features, module.in_features
        rows, columns = cast(Tensor, module.weight).flatten(1).shape
        return (columns, rows) if is_conv1d(module) else (rows, columns)

    def replace(self, module: nn.Module) -> None:
        """Replace the current module by `module`; a compressed kernel gets the geometry of the convolution."""
        geometry = self.geometry
        if geometry is not None and isinstance(module, CompressedLayer):
            module = module if isinstance(module, PackedConv2d) else PackedConv2d(module, geometry)
        setattr(self.parent, self.attribute, module)

    def dense_module(self, weight: Tensor) -> nn.Module:
        """An `nn.Linear` or `nn.Conv2d` that applies `weight` [out, in] with this site's bias (no copy is made)."""
        geometry = self.geometry
        dense: nn.Module
        if geometry is None:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            dense = geometry.module(weight.shape[0])
            weight = geometry.kernel_of(weight)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return dense

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of this site for x with another weight [out, in] and bias [out]; differentiable in all three.

        Args:
            x: as the model calls the site: [..., in], or [n, channels, height, width] for a convolution.

        Example:
            >>> site = Site("0", 0, nn.Sequential(nn.Conv2d(3, 8, 3)), "0")
            >>> site.apply(torch.ones(1, 3, 5, 5), torch.ones(8, 27)).unique().item()
            27.0
        """
        geometry = self.geometry
        return F.linear(x, weight, bias) if geometry is None else geometry.convolve(x, weight, bias)


def has_blocks(model: nn.Module) -> bool:
    """Whether `model` is a language model of transformers, which is compressed block by block, or any other model.

    Example:
        >>> has_blocks(nn.Sequential(nn.Conv2d(3, 8, 3)))
        False
    """
    return getattr(model, "main_input_name", None) == "input_ids"


# modules that read the weights of their children themselves instead of calling them
_READ_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _why_no_site(module: nn.Module, owner: nn.Module, names: int) -> str | None:
    """The reason why a module with `names` names, of a model without blocks, is no site; None if it is one."""
    if not (is_linear(module) or isinstance(module, nn.Conv2d)):
        return "not a linear map"
    if names > 1:
        return f"it is used at {names} places of the model"
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(module, kind) and type(module).forward is not kind.forward:
            return "it has a forward of its own"
    if isinstance(owner, _READ_DIRECTLY):
        return f"{type(owner).__name__} reads its weight directly"
    return "router or gate" if _ROUTER.search(type(owner).__name__) else None


def _names(model: nn.Module) -> Counter[nn.Module]:
    """The number of names that each module has in the model."""
    return Counter(module for _, module in model.named_modules(remove_duplicate=False))


def _sites_of_whole(model: nn.Module) -> list[Site]:
    """Every linear map and convolution, in the order of the modules."""
    _refuse_encoder_decoder(model)
    sites: list[Site] = []
    found: list[str] = []
    names = _names(model)
    for name, module in model.named_modules():
        if not name or any(name.startswith(outer + ".") for outer in found):
            continue  # the inside of an already compressed layer
        if isinstance(module, CompressedLayer):
            found.append(name)
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        if _why_no_site(module, owner, names[module]) is None:
            sites.append(Site(name, len(sites), owner, attribute))
    if not sites:
        raise OptionError(
            f"model={type(model).__name__}: found no nn.ModuleList of blocks, and no nn.Linear or nn.Conv2d inside it"
        )
    return sites


def find_sites(model: nn.Module, targets: str | None = None) -> list[Site]:
    """All sites of a model, in the order of its blocks or, in a model without blocks, of its modules.

    Fused experts are unfused in place first (views, no copy), so that each expert's maps are sites.

    Args:
        model: a decoder-only model from transformers, or any other model (see `has_blocks`), compressed or not,
            possibly on "meta".
        targets: a regular expression searched for in the site's name; None selects all.

    Raises:
        OptionError: `targets` matches nothing, or the model is not supported.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with torch.device("meta"):
        ...     model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=1, vocab_size=9))
        >>> [site.name for site in find_sites(model, "mlp")]
        ['transformer.h.0.mlp.c_fc', 'transformer.h.0.mlp.c_proj']
    """
    unfuse_experts(model)
    sites = _sites_of_blocks(model) if has_blocks(model) else _sites_of_whole(model)
    if targets is None:
        return sites
    try:
        chosen = [site for site in sites if re.search(targets, site.name)]
    except re.error as error:
        raise OptionError(f"targets={targets!r} is not a regular expression: {error}") from error
    if not chosen:
        raise OptionError(
            f"targets={targets!r} matches no site; names look like {sites[0].name!r}"
            if sites
            else "model: it has no linear maps inside its blocks"
        )
    return chosen


_PLAIN = ("FalconLinear",)  # subclasses of `nn.Linear` with a forward of their own that is its own
_UNFIT = {"rwkv": "it scales the weights of its blocks in place when it is put to use"}  # by model_type


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass of `nn.Linear` computes something else than one."""
    other = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return other and type(module).__name__ not in _PLAIN


def _sites_of_blocks(model: nn.Module) -> list[Site]:
    """The linear maps inside the decoder blocks, in the order of the blocks."""
    prefix, blocks = find_blocks(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _UNFIT:
        raise OptionError(f"model={type(model).__name__} is not supported because {_UNFIT[kind]}; use another model")
    sites: list[Site] = []
    seen: set[nn.Module] = set()  # a module that several blocks share is one site, of the first of them
    for index, block in enumerate(blocks):
        found: list[str] = []
        for name, module in block.named_modules():
            if any(name.startswith(outer + ".") for outer in found):
                continue  # the inside of an already compressed layer
            if is_linear(module):
                found.append(name)
                parent, _, attribute = name.rpartition(".")
                owner = block.get_submodule(parent)
                site = Site(f"{prefix}.{index}.{name}", index, owner, attribute)
                if module in seen or _has_own_forward(module):
                    continue
                seen.add(module)
                if site.out_features >= ROUTER_WIDTH and not _ROUTER.search(type(owner).__name__):
                    sites.append(site)
    return sites


def skipped_modules(model: nn.Module, sites: list[Site]) -> dict[str, str]:
    """Modules that hold parameters and are left as they are, with the reason, for reports.

    Example:
        >>> skipped_modules(nn.Sequential(nn.LayerNorm(4)), [])
        {'0': 'LayerNorm: not a linear map'}
    """
    chosen = {site.name for site in sites}
    left: dict[str, str] = {}
    names = _names(model)
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if any(name == site or name.startswith(site + ".") for site in chosen):
            continue
        kind = type(module).__name__
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding):
            reason = "embedding"
        elif not has_blocks(model):
            reason = _why_no_site(module, owner, names[module]) or "not among the targets"
        elif is_linear(module):
            rows = module.out_features if isinstance(module, (nn.Linear, CompressedLayer)) else module.nf
            router = cast(int, rows) < ROUTER_WIDTH or _ROUTER.search(type(owner).__name__)
            left_as = "it has a forward of its own" if _has_own_forward(module) else "head, or not among the targets"
            reason = "router or gate" if router else left_as
        else:
            reason = "not a linear map"
        left[name] = f"{kind}: {reason}"
    return left
