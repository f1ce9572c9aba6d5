"""The reference: everything is kept uncompressed."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.core.cache import LayerShape, Policy, TailLayer


@dataclass(frozen=True)
class Full(Policy):
    """Keep every token in the model's dtype: the tokens and bytes of the library's own cache.

    Example:
        >>> Full()
        Full()
    """

    def layer(self, shape: LayerShape, streamed: bool) -> TailLayer:
        return TailLayer(shape.heads, streamed)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        return length * shape.token_bytes
