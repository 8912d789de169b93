"""The attention of one step through the cache, in plain torch: for CPUs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lragent.attention import SplitProjection, attend_by_reader, split_keys, split_projection
from lragent.kernels.attention import lora_attention
from lragent.rope import Rope
from lragent.routing import Route
from lragent.serve.cache.pools import CachePools
from lragent.serve.cache.slots import Slots
from lragent.serve.engine.step import Part, Step

Rows = slice | torch.Tensor
"""Slots or rows of a batch: a slice where they lie in one run, so that they are read in place."""


def as_rows(numbers: Slots, device: torch.device) -> Rows:
    """numbers: [n]. A slice if they count up by one."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.as_tensor(numbers, device=device)


@dataclass(frozen=True)
class CachedPiece:
    """A piece's place in the flat batch, and where its whole context lies in the pools."""

    batch: slice
    context: int
    base: Rows
    low: Rows
    readers: torch.Tensor | int


@dataclass(frozen=True)
class Writes:
    """Which rows of the flat batch are written to which slots."""

    rows: Rows
    slots: Rows

    @property
    def empty(self) -> bool:
        """Whether nothing is written."""
        return isinstance(self.rows, torch.Tensor) and not len(self.rows)


@dataclass(frozen=True)
class CachedPass:
    """The attention of one step (see lragent.attention.AttentionPass)."""

    pools: CachePools
    pieces: tuple[CachedPiece, ...]
    route: Route
    base_writes: Writes
    low_writes: Writes
    rope: Rope | None

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See AttentionPass. Writes what is new, then reads the whole context of each piece."""
        index = int(layer.layer_idx)  # type: ignore[arg-type]  # transformers' attention layers all have it
        v_proj, k_proj = split_projection(layer, "v_proj", self.route), split_projection(layer, "k_proj", self.route)
        low_v = self._store_low(v_proj, self.pools.low_v, index)
        low_k = self._store_low(k_proj, self.pools.low_k, index)
        key, norm = (key, None) if k_proj is None else split_keys(layer, k_proj, key)
        keys, values = self.pools.key[index], self.pools.value[index]
        if not self.base_writes.empty:
            keys[:, self.base_writes.slots] = key[:, self.base_writes.rows]
            values[:, self.base_writes.slots] = value[:, self.base_writes.rows]
        up_v = v_proj.reader_up() if v_proj else None
        parts = []
        for piece in self.pieces:
            low = None if low_v is None else low_v[piece.low]
            if k_proj is None or low_k is None:
                parts.append(
                    lora_attention(
                        query[:, piece.batch],
                        keys[:, piece.base],
                        values[:, piece.base],
                        low,
                        up_v,
                        piece.readers,
                        scale=scale,
                        window=window,
                        softcap=softcap,
                    )
                )
                continue
            assert self.rope is not None, "a split k_proj needs the rotary embedding"
            parts.append(
                attend_by_reader(
                    query[:, piece.batch],
                    keys[:, piece.base],
                    low_k[piece.low],
                    k_proj.reader_up(),
                    (self.rope[0][: piece.context], self.rope[1][: piece.context]),
                    values[:, piece.base],
                    low,
                    up_v,
                    self.route.roles[piece.batch],
                    norm=norm,
                    scale=scale,
                    window=window,
                    softcap=softcap,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _store_low(
        self, projection: SplitProjection | None, pool: torch.Tensor | None, index: int
    ) -> torch.Tensor | None:
        """Store a split projection's low-rank activation; returns that layer's LR cache [slots, r]."""
        if projection is None or pool is None:
            return None
        pool[index][self.low_writes.slots] = projection.take_low()[0][self.low_writes.rows]
        return pool[index]


@dataclass(frozen=True)
class CachedAttention:
    """Makes the passes of one model. rope: cos and sin of every position, where `k_proj` is split."""

    pools: CachePools
    rope: Rope | None = None

    def __call__(self, step: Step, route: Route) -> CachedPass:
        """The pass of `step`, whose tokens have the roles of `route`."""
        device = self.pools.key.device

        def rows(parts: list[Slots]) -> Rows:
            return as_rows(np.concatenate(parts), device)

        return CachedPass(
            self.pools,
            tuple(_cached_piece(part, step.roles[part.start : part.end], device) for part in step.parts),
            route,
            Writes(
                rows([np.arange(part.first_new, part.end) for part in step.parts]),
                rows([part.base_slots[len(part.base_slots) - (part.end - part.first_new) :] for part in step.parts]),
            ),
            Writes(slice(0, len(step.roles)), rows([part.low_slots[part.start - part.end :] for part in step.parts])),
            self.rope,
        )


def _cached_piece(part: Part, roles: list[int], device: torch.device) -> CachedPiece:
    readers: torch.Tensor | int = roles[0]
    if any(role != roles[0] for role in roles):
        readers = torch.tensor(roles, device=device)
    base, low = (as_rows(slots, device) for slots in (part.base_slots, part.low_slots))
    return CachedPiece(slice(part.start, part.end), part.context, base, low, readers)
