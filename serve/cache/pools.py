"""The tensors behind the slots: keys, values and low-rank activations of all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.errors import UserError


@dataclass(frozen=True)
class CacheShape:
    """What one token's cache holds. rank_v, rank_k: 0 where that projection has no LR cache."""

    layers: int
    kv_heads: int
    head_dim: int
    rank_v: int = 0
    rank_k: int = 0

    @property
    def width(self) -> int:
        """Numbers of keys and values per token and layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def entry(self) -> int:
        """Numbers that an LR entry takes in a page of LR entries, per layer.

        A slot's numbers are divided into entries without a rest, so that all entries of all pages lie at one distance;
        of a multiple of 8 where that is possible, so that they are aligned. Raises UserError where none is large
        enough.
        """
        rank = self.rank_v + self.rank_k
        fitting = [size for size in range(max(rank, 1), self.width + 1) if self.width % size == 0]
        if not fitting:
            raise UserError(
                f"--sharing base_shared: the ranks of v_proj and k_proj are {rank} together, more than the "
                f"{self.width} numbers of a token's keys and values; serve with --sharing non_shared, or compress the "
                "adapters."
            )
        return next((size for size in fitting if size % 8 == 0), fitting[0])

    @property
    def lr_per_slot(self) -> int:
        """LR entries in a page, which is a base slot. Raises UserError where none fits."""
        return self.width // self.entry

    def base_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values per token."""
        return self.layers * self.width * dtype.itemsize

    def lr_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of LR cache per token."""
        return self.layers * (self.rank_v + self.rank_k) * dtype.itemsize


class CachePools:
    """Memory for `slots` base entries and, where shape has ranks, their LR entries.

    key, value: [layers, kv_heads, slots, head_dim]; a token's keys and values of one layer lie together. low_v, low_k:
    [layers, lr_slots, rank], or None. All may have any strides but the last, which is 1.
    paged: the LR entries are laid out in base slots, `shape.lr_per_slot` to each (see `cache.pages`), so that base and
    LR cache share one memory; else each base entry has an LR entry of its own, and lr_slots is slots.
    """

    def __init__(
        self, shape: CacheShape, slots: int, dtype: torch.dtype, device: torch.device | str, *, paged: bool
    ) -> None:
        self.shape = shape
        layers, heads, dim = shape.layers, shape.kv_heads, shape.head_dim
        arena = torch.empty((layers, slots, 2, heads, dim), dtype=dtype, device=device)
        self.key = arena[:, :, 0].transpose(1, 2)
        self.value = arena[:, :, 1].transpose(1, 2)
        self.low_v: torch.Tensor | None = None
        self.low_k: torch.Tensor | None = None
        if paged:
            entries = arena.view(layers, slots * shape.lr_per_slot, shape.entry)
            self.low_v = entries[..., : shape.rank_v] if shape.rank_v else None
            self.low_k = entries[..., shape.rank_v : shape.rank_v + shape.rank_k] if shape.rank_k else None
        else:
            self.low_v, self.low_k = (
                torch.empty((layers, slots, rank), dtype=dtype, device=device) if rank else None
                for rank in (shape.rank_v, shape.rank_k)
            )
        self.base_bytes = arena.nbytes
        """Bytes of the memory for base entries (and LR entries, where they share it)."""
        self.lr_bytes = 0 if paged else slots * shape.lr_bytes(dtype)
        """Bytes of the memory for LR entries alone."""
