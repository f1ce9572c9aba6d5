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
    """How a layer turns queries and keys: its first channels, in pairs; the others stay as they are.

    Args:
        frequencies: radians per token of each pair, fp32 [r / 2]: the first r channels are turned. Empty for a layer
            that turns nothing.
        factor: cos and sin are multiplied with it.
        alternate: pair neighbours (2i, 2i + 1), as GLM, Helium and Cohere do, instead of halves (i, i + r/2).

    Example:
        >>> rotary = Rotary(torch.tensor([1.0, 0.1]), 1.0)
        >>> cos, sin = rotary(torch.tensor([[0, 3]]))
        >>> cos.shape, sin[0, 0].tolist()
        (torch.Size([1, 2, 4]), [0.0, 0.0, 0.0, 0.0])
        >>> rotary.turn(torch.ones(6), cos[0, 0], sin[0, 0]).tolist()   # position 0, and two channels more
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, frequencies: Tensor, factor: float, alternate: bool = False) -> None:
        self.frequencies, self.factor, self.alternate = frequencies, factor, alternate

    def turns_halves_of(self, width: int) -> bool:
        """Whether all of ``width`` channels are turned, halves paired, as `rotate` does it."""
        return not self.alternate and 2 * len(self.frequencies) == width

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn queries or keys as the layer does.

        Args:
            x: [..., d].
            cos, sin: [..., r], of `__call__`; broadcast against the first channels of ``x``.

        Returns:
            [..., d], in the wider dtype of ``x`` and ``cos``.
        """
        if self.turns_halves_of(x.shape[-1]):
            return rotate(x, cos, sin)
        width = 2 * len(self.frequencies)
        first, rest = x[..., :width], x[..., width:]
        if self.alternate:
            turned = rotate(torch.cat([first[..., ::2], first[..., 1::2]], -1), cos, sin)
            turned = torch.stack(turned.chunk(2, -1), -1).flatten(-2)
        else:
            turned = rotate(first, cos, sin)
        return torch.cat([turned, rest.to(turned.dtype)], -1)

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
        """Raise `OptionError` unless the model gives the tokens at these positions the angles that this does.

        How the layer pairs channels cannot be told from that: see `refimpl.core.cache.trial`.

        Args:
            positions: [B or 1, n].
            rotation: cos and sin as the attention module got them, [B or 1, n, r] in either order of channels, or
                [B or 1, n, r / 2].
            valid: bool [B, n]: False for padding, which may be rotated in any way; None if there is none.
        """
        pairs = len(self.frequencies)
        if not pairs:
            return
        ours, theirs = self(positions)[0][..., :pairs], rotation[0].float()
        if theirs.shape[-1] in (pairs, 2 * pairs):
            layouts = [theirs[..., :pairs]] + [theirs[..., ::2]] * (theirs.shape[-1] == 2 * pairs)
            errors = [(ours - layout).abs().amax(-1) for layout in layouts]
            if valid is not None:
                errors = [error * valid for error in errors]
            if read(torch.stack([error.max() for error in errors]).min()) < 0.02:  # the model rounds to 16 bits
                return
        raise OptionError(
            "position_ids: this policy turns keys by their positions, but the model was not given those of the real "
            "tokens (or its rotary embedding is not the one that was found); pass position_ids as generate makes them, "
            "or use a policy that takes keys as they come, such as KIVI or SnapKV"
        )

    def seen_in(self, keys: Tensor) -> Rotary | None:
        """This embedding with the pairing that a layer is seen to use; None if it turns keys in another way.

        Args:
            keys: of one vector at positions 0, 1, ..., n - 1, [1, H, n, d] with n > 1.

        Example:
            >>> rotary = Rotary(torch.tensor([1.0, 0.1]), 1.0)
            >>> cos, sin = rotary(torch.arange(3).unsqueeze(0))
            >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 3, 4)
            >>> rotary.seen_in(rotate(x, cos[:, None], sin[:, None])).alternate, len(rotary.seen_in(x).frequencies)
            (False, 0)
            >>> rotary.seen_in(torch.stack([x[:, :, 0], -x[:, :, 0]], 2)) is None
            True
        """
        wide, count = keys.float(), keys.shape[2]
        first = wide[:, :, :1].expand_as(wide)
        bare = Rotary(self.frequencies, 1.0)  # the factor is in the key at position 0 already
        cos, sin = (x.unsqueeze(1) for x in bare(torch.arange(count, device=keys.device).unsqueeze(0)))
        nothing = self.frequencies[:0]
        for found in (
            Rotary(self.frequencies, self.factor),
            Rotary(self.frequencies, self.factor, alternate=True),
            Rotary(nothing, 1.0),
        ):
            width = 2 * len(found.frequencies)
            if width > wide.shape[-1]:
                continue
            # channel by channel: a few large ones that hardly turn must not hide the others
            missed = (found.turn(first, cos[..., :width], sin[..., :width]) - wide).abs().amax((1, 2))
            missed = missed / wide.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
            parts = (part.mean() for part in missed.tensor_split([2 * len(self.frequencies)], -1) if part.numel())
            if read(torch.stack(list(parts)).max()) < 0.03:
                return found
        return None


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
