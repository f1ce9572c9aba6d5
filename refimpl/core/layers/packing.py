"""Dense bit packing: eight codes of b bits become b bytes."""

from __future__ import annotations

import torch
from torch import Tensor

_SPREAD = {4: torch.int16, 2: torch.int32, 1: torch.int64}  # eight bits for each code of a byte


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack small unsigned integers along the last dimension.

    Args:
        codes: integers in ``[0, 2**bits)``, any integer dtype, shape ``[..., n]``.
        bits: 1 to 8.

    Returns:
        uint8, shape ``[..., ceil(n / 8) * bits]``; the last word is padded with zeros.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0, 1, 2, 3, 0]), 2).tolist()
        [57, 57]
    """
    codes = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[-1] % 8))
    words = codes.unflatten(-1, (-1, 8))
    shifts = torch.arange(8, device=codes.device) * bits
    word = (words << shifts).sum(-1)  # fields do not overlap, so a sum is an "or"
    octets = (word.unsqueeze(-1) >> (8 * torch.arange(bits, device=codes.device))) & 255
    return octets.to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8, shape ``[..., ceil(n / 8) * bits]``.
        bits: 1 to 8, as packed.
        n: number of codes along the last dimension.

    Returns:
        uint8, shape ``[..., n]``.

    Example:
        >>> unpack_bits(torch.tensor([57, 57], dtype=torch.uint8), 2, 7).tolist()
        [1, 2, 3, 0, 1, 2, 3]
    """
    mask = 2**bits - 1
    if bits == 8:
        return packed[..., :n]
    if 8 % bits == 0:  # no code straddles a byte: spread each byte over a word, then read the word as bytes
        word = packed.contiguous().to(_SPREAD[bits])
        reach = 8 // bits // 2
        while reach:  # code i from bit `bits * i` to bit `8 i`: the upper half of the codes, then of each half, ...
            word |= word << (8 - bits) * reach
            reach //= 2
        word &= sum(mask << 8 * i for i in range(8 // bits))
        return word.view(torch.uint8)[..., :n]
    wide = torch.int32 if bits < 4 else torch.int64
    octets = packed.unflatten(-1, (-1, bits)).to(wide)
    word = octets[..., 0]
    for i in range(1, bits):
        word = word | (octets[..., i] << (8 * i))
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device, dtype=wide)
    codes = (word.unsqueeze(-1) >> shifts) & mask
    return codes.to(torch.uint8).flatten(-2)[..., :n]
