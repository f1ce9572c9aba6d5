"""Rotary positions (RoPE): turn keys back, and turn them again at given positions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from refimpl.core.device import read
from refimpl.core.errors import OptionError

# All layers ask for the cos and sin of the same positions: kept for as long as the tensor of positions lives.
_TURNS: Any = WeakTensorKeyDictionary()
_MOVING = {"dynamic", "longrope"}  # their frequencies change with the length: a key cannot be turned again later


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of channels, as Llama-like models rotate queries and keys.

    Each pair becomes ``(x_i cos - x_j sin, x_j cos + x_i sin)`` with ``j = i + d/2``.

    Args:
        x: [..., d].
        cos, sin: broadcast against ``x``.

    Example:
        >>> turned = rotate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
        >>> turned.tolist()   # a quarter turn
        [0.0, 1.0]
    """
    half = x.shape[-1] // 2
    out = x * cos  # the rest is added in place: at these sizes new memory costs more than the arithmetic
    wide = x.to(out.dtype)
    sin = sin.to(out.dtype)
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo `rotate`, and the factor that some models (YaRN) put into cos and sin.

    Example:
        >>> cos, sin = torch.tensor([0.6, 0.6]) * 1.1, torch.tensor([0.8, 0.8]) * 1.1
        >>> x = torch.tensor([1.0, 2.0])
        >>> torch.allclose(unrotate(rotate(x, cos, sin), cos, sin), x)
        True
    """
    return rotate(x, cos, -sin) / (cos * cos + sin * sin)


class Rotary:
    """Cos and sin of a model's layers at any positions, from its frequencies.

    Args:
        frequencies: radians per token, fp32 [d / 2].
        factor: cos and sin are multiplied with it.

    Example:
        >>> cos, sin = Rotary(torch.tensor([1.0, 0.1]), 1.0)(torch.tensor([[0, 3]]))
        >>> cos.shape, sin[0, 0].tolist()
        (torch.Size([1, 2, 4]), [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, frequencies: Tensor, factor: float) -> None:
        self.frequencies, self.factor = frequencies, factor

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, n] to cos and sin, fp32 [B, n, d]; do not write into them: the same positions share them."""
        known = _TURNS.setdefault(positions, {})
        key = id(self.frequencies), self.factor
        if key not in known:
            angles = positions.unsqueeze(-1) * self.frequencies.to(positions.device)
            angles = torch.cat([angles, angles], -1)
            cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
            known[key] = self.frequencies, cos, sin
        return known[key][1:]

    def check(self, positions: Tensor, rotation: tuple[Tensor, Tensor], valid: Tensor | None) -> None:
        """Raise `OptionError` unless the model rotates the tokens at these positions as this does.

        Args:
            positions: [B or 1, n].
            rotation: cos and sin as the attention module got them, [B or 1, n, d].
            valid: bool [B, n]: False for padding, which may be rotated in any way; None if there is none.
        """
        ours, theirs = self(positions)[0], rotation[0]
        if ours.shape[-1] == theirs.shape[-1]:
            error = (ours - theirs.float()).abs().amax(-1)
            if valid is not None:
                error = error * valid
            if read(error.max()) < 0.02:  # the model rounds to 16 bits
                return
        raise OptionError(
            "model: this policy turns keys by their positions, but the model does not rotate in the usual way (all "
            "channels, halves paired), or the positions are not those of the real tokens; pass position_ids as "
            "generate makes them, or use a policy that takes keys as they come, such as KIVI or SnapKV"
        )


def find_rotary(model: nn.Module, layer_type: str | None) -> Rotary | None:
    """The rotary embedding of the layers of one type, or None if there is none or it moves with the length.

    Args:
        model: a decoder of transformers.
        layer_type: as in ``config.layer_types``; models with one embedding for all layers ignore it.

    Example:
        >>> find_rotary(nn.Linear(2, 2), None) is None
        True
    """
    for module in model.modules():
        name = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
        if not isinstance(getattr(module, f"{name}inv_freq", None), Tensor):
            continue
        kind: Any = getattr(module, "rope_type", "default")
        kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
        if kind in _MOVING:
            return None
        factor = getattr(module, f"{name}attention_scaling", 1.0)
        return Rotary(cast(Tensor, getattr(module, f"{name}inv_freq")).float(), float(factor))
    return None
