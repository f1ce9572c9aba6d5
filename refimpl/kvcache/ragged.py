"""The layer of a MatryoshkaKV cache: heads keep different numbers of columns, packed side by side.

Each head's keys are projected on the first columns of a basis of their own, ``(k - mu) Q[:, :r]``, and queries too, so
keys are never rebuilt. The weighted sum of the values is, ``v Q[:, :r]^T + mu``, unless the output matrix after
attention has taken that over (`FoldedOutput`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refimpl.core.cache import ByContent, Incoming, KVLayer, Segment
from refimpl.core.cache.attention import single
from refimpl.core.errors import OptionError
from refimpl.kernels.ragged_decode import Inputs, ragged_decode, unsupported

Ranks = tuple[tuple[int, ...], tuple[int, ...]]
"""Ranks of one layer: of the keys of each head, and of the values."""


@dataclass(frozen=True)
class Bases(ByContent):
    """The bases of one layer.

    Attributes:
        Q_K, Q_V: fp32 [H, d, d], a basis in the columns, the most important first.
        mu_K, mu_V: fp32 [H, d], the mean that is subtracted before projecting.
    """

    Q_K: Tensor
    Q_V: Tensor
    mu_K: Tensor
    mu_V: Tensor


class FoldedOutput(nn.Linear):
    """An output matrix that reads projected values: see `fold`.

    Attributes:
        ranks: of the values of each key-value head.
    """

    def __init__(self, weight: Tensor, bias: Tensor, ranks: tuple[int, ...]) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise OptionError(
                f"model: its output matrices were folded for values of ranks {self.ranks} and cannot read whole ones; "
                "pass a cache of the policy they were folded for, or load the model again"
            )
        return super().forward(x)


OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")  # names of the output matrix of attention in models


def output_name(module: nn.Module) -> str | None:
    """Name of the attribute of an attention module that is its output matrix; None if it is none we know.

    Example:
        >>> output_name(nn.Linear(2, 2)) is None
        True
    """
    return next((name for name in OUTPUTS if isinstance(getattr(module, name, None), nn.Module)), None)


def output_matrix(module: nn.Module) -> nn.Module | None:
    """The output matrix of an attention module; None if it has none we know (see `output_name`).

    Example:
        >>> output_matrix(nn.Linear(2, 2)) is None
        True
    """
    name = output_name(module)
    return None if name is None else getattr(module, name)


def _by_group(rows: Tensor, matrix: Tensor) -> Tensor:
    """[B, G, Q, m] times [B, m, n], which all query heads of the group share: one product, the matrix read once."""
    return (rows.flatten(1, 2) @ matrix).unflatten(1, rows.shape[1:3])


class Packed(Segment):
    """All entries: heads side by side, each with as many numbers as its rank.

    Args:
        keys, values: [B, 1, n, sum of ranks].
        bases: of the layer, on the device of the keys.
        ranks: of the layer.
        folded: return mixed values as they are stored, for an output matrix that rebuilds them itself.
    """

    def __init__(self, keys: Tensor, values: Tensor, bases: Bases, ranks: Ranks, folded: bool) -> None:
        self.packed_keys, self.packed_values = keys[:, 0], values[:, 0]
        self.bases, self.ranks, self.folded = bases, ranks, folded
        self.index = range(keys.shape[2])

    def scores(self, query: Tensor, slots: range) -> Tensor:
        # q (k - mu)^T = (q Q)(k~)^T over the first r columns; q mu^T is the same for all keys and leaves the softmax alone
        turned = query @ self.bases.Q_K[:, None]  # [B, H, G, Q, d]
        heads = self.packed_keys.float().split(self.ranks[0], -1)
        return torch.stack([_by_group(turned[:, h, :, :, : key.shape[-1]], key.mT) for h, key in enumerate(heads)], 1)

    def mix(self, weights: Tensor) -> Tensor:
        heads = self.packed_values.float().split(self.ranks[1], -1)
        mixed = [_by_group(weights[:, h], value) for h, value in enumerate(heads)]  # [B, G, Q, r]
        if self.folded:  # query heads side by side, as the output matrix reads them
            return torch.cat([m.transpose(1, 2).flatten(2) for m in mixed], -1)[:, None, None]
        Q, mu = self.bases.Q_V, self.bases.mu_V  # (sum of p v~) Q[:, :r]^T + mu: the weights p of a query sum to one
        return torch.stack([m @ Q[h, :, : m.shape[-1]].T + mu[h] for h, m in enumerate(mixed)], 1)


class MatryoshkaLayer(KVLayer):
    """One layer of a MatryoshkaKV cache.

    Parts: "keys" [B, 1, n, sum of the keys' ranks], "values" [B, 1, n, sum of the values' ranks].
    """

    def __init__(self, bases: Bases, ranks: Ranks, heads: int) -> None:
        super().__init__(heads, streamed=True)
        self.bases, self.ranks = bases, ranks
        d = bases.Q_K.shape[-1]
        self.columns = [torch.tensor([h * d + c for h, rank in enumerate(side) for c in range(rank)]) for side in ranks]

    def append(self, incoming: Incoming) -> None:
        b, device = self.bases, incoming.keys.device
        if b.Q_K.device != device:  # a policy read from a file lies on the CPU
            self.bases = Bases(b.Q_K.to(device), b.Q_V.to(device), b.mu_K.to(device), b.mu_V.to(device))
            self.columns = [index.to(device) for index in self.columns]
        self.extend(
            keys=self._packed(incoming.keys, self.bases.Q_K, self.bases.mu_K, self.columns[0]),
            values=self._packed(incoming.values, self.bases.Q_V, self.bases.mu_V, self.columns[1]),
        )

    @staticmethod
    def _packed(x: Tensor, Q: Tensor, mu: Tensor, columns: Tensor) -> Tensor:
        whole = ((x.float() - mu.unsqueeze(1)) @ Q).transpose(1, 2).flatten(2)  # [B, n, H d]
        return whole.index_select(-1, columns).unsqueeze(1).to(x.dtype)

    def segments(self, incoming: Incoming) -> list[Segment]:
        folded = isinstance(output_matrix(incoming.module), FoldedOutput)
        return [Packed(self.parts["keys"], self.parts["values"], self.bases, self.ranks, folded)]

    def kernel_inputs(self, incoming: Incoming) -> Inputs | None:
        """Arguments of `refimpl.kernels.ragged_decode` for one decoded token; None for anything it does not do."""
        if len(incoming.slots) > 1 or incoming.softcap is not None:
            return None
        incoming.mask.block(incoming.slots, range(0))  # refuses masks that are more than causal
        if not incoming.mask.padded_on_the_left:
            return None
        b, p = self.bases, self.parts
        query = (incoming.query.unflatten(1, (self.heads, -1)).float() @ b.Q_K[:, None]).flatten(1, 2)
        folded = isinstance(output_matrix(incoming.module), FoldedOutput)
        basis, mean = (None, None) if folded else (b.Q_V, b.mu_V)
        return Inputs(
            query.to(incoming.query.dtype),
            p["keys"],
            p["values"],
            *self.ranks,
            incoming.scaling,
            basis,
            mean,
            incoming.mask.first_real,
        )

    def attention(self, incoming: Incoming) -> tuple[Tensor, Tensor | None]:
        inputs = self.kernel_inputs(incoming) if incoming.keys.is_cuda else None
        if inputs is not None and unsupported(inputs) is None:
            out = ragged_decode(*inputs)
            return (out[:, None, None] if inputs.basis is None else out), None
        return self._attend_in_torch(incoming)

    def _attend_in_torch(self, incoming: Incoming) -> tuple[Tensor, Tensor | None]:
        width = self.ranks[0][0]
        even = all(rank == width for side in self.ranks for rank in side)
        if (
            not even
            or len(incoming.slots) > 1
            or incoming.slots != incoming.mask.queries
            or incoming.softcap is not None
        ):
            return super().attention(incoming)
        # one token and heads alike: ordinary attention between narrow heads, on the cache as it lies
        b, dtype = self.bases, incoming.query.dtype
        query = incoming.query.unflatten(1, (self.heads, -1)).float() @ b.Q_K[:, None, :, :width]
        keys, values = (
            self.parts[name][:, 0].unflatten(-1, (-1, width)).transpose(1, 2) for name in ("keys", "values")
        )
        mixed = single(query.flatten(1, 2).to(dtype), keys, values, incoming.mask, incoming.scaling)  # [B, Hq, 1, r]
        if isinstance(output_matrix(incoming.module), FoldedOutput):
            return mixed.transpose(1, 2).flatten(2).unsqueeze(1), None
        out = mixed.unflatten(1, (self.heads, -1)).float() @ b.Q_V[:, None, :, :width].mT + b.mu_V[:, None, None]
        return out.flatten(1, 2).to(dtype), None

    def crop_to(self, length: int) -> None:
        for name, tensor in self.parts.items():
            self.parts[name] = tensor[:, :, :length].clone()
