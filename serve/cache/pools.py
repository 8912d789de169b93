"""The tensors behind the slots: keys, values and low-rank activations of all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """What one token's cache holds. rank_v, rank_k: 0 where that projection has no LR cache."""

    layers: int
    kv_heads: int
    head_dim: int
    rank_v: int = 0
    rank_k: int = 0

    def base_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    def lr_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of LR cache per token."""
        return self.layers * (self.rank_v + self.rank_k) * dtype.itemsize


class CachePools:
    """Memory for `slots` base entries and `lr_slots` LR entries.

    key, value: [layers, kv_heads, slots, head_dim]. low_v, low_k: [layers, lr_slots, rank], or None.
    """

    def __init__(
        self, shape: CacheShape, slots: int, lr_slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.shape = shape
        base = (shape.layers, shape.kv_heads, slots, shape.head_dim)
        self.key = torch.empty(base, dtype=dtype, device=device)
        self.value = torch.empty(base, dtype=dtype, device=device)
        self.low_v = self._low(shape.rank_v, lr_slots, dtype, device)
        self.low_k = self._low(shape.rank_k, lr_slots, dtype, device)

    def _low(self, rank: int, slots: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor | None:
        return torch.empty((self.shape.layers, slots, rank), dtype=dtype, device=device) if rank else None
