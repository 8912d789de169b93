"""The attention of one step through the cache, in plain torch: for CPUs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lragent.attention import attend_by_reader
from lragent.kernels.attention import lora_attention
from lragent.rope import Rope, rotate
from lragent.routing import Route
from lragent.serve.cache.pools import CachePools
from lragent.serve.cache.slots import Slots
from lragent.serve.engine.new_states import CachePass, NewStates
from lragent.serve.engine.step import Ints, Step
from lragent.serve.engine.step_tensors import StepTensors

Rows = slice | torch.Tensor
"""Slots or rows of a batch: a slice where they lie in one run, so that they are read in place."""


def as_rows(numbers: Slots, device: torch.device) -> Rows:
    """numbers: [n]. A slice if they count up by one."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.as_tensor(numbers, dtype=torch.long, device=device)


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
class CachedPass(CachePass):
    """The attention of one step (see lragent.attention.AttentionPass)."""

    pools: CachePools
    pieces: tuple[CachedPiece, ...]
    base_from: int
    route: Route
    base_writes: Writes
    low_writes: Writes
    rope: Rope | None

    def through_cache(
        self, index: int, new: NewStates, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """See CachePass."""
        query, key, value = (states.transpose(0, 1) for states in (new.query, new.key, new.value))  # [H, T, D]
        if new.rope is not None:
            query = rotate(query, new.rope)
            key = key if new.norm is not None else rotate(key, new.rope)
        low_v = self._store_low(new.low_v, self.pools.low_v, index)
        low_k = self._store_low(new.low_k, self.pools.low_k, index)
        keys, values = self.pools.key[index], self.pools.value[index]
        if not self.base_writes.empty:
            keys[:, self.base_writes.slots] = key[:, self.base_writes.rows]
            values[:, self.base_writes.slots] = value[:, self.base_writes.rows]
        parts = []
        for piece in self.pieces:
            low = None if low_v is None else low_v[piece.low]
            if new.up_k is None or low_k is None:
                parts.append(
                    lora_attention(
                        query[:, piece.batch],
                        keys[:, piece.base],
                        values[:, piece.base],
                        low,
                        new.up_v,
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
                    new.up_k,
                    (self.rope[0][: piece.context], self.rope[1][: piece.context]),
                    values[:, piece.base],
                    low,
                    new.up_v,
                    self.route.roles[piece.batch],
                    norm=new.norm,
                    scale=scale,
                    window=window,
                    softcap=softcap,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _store_low(self, low: torch.Tensor | None, pool: torch.Tensor | None, index: int) -> torch.Tensor | None:
        """Store a low-rank activation [T, r]; returns that layer's LR cache [slots, r]."""
        if low is None or pool is None:
            return None
        pool[index][self.low_writes.slots] = low[self.low_writes.rows]
        return pool[index]


@dataclass(frozen=True)
class CachedAttention:
    """Makes the passes of one model. rope: cos and sin of every position, where `k_proj` is split."""

    pools: CachePools
    rope: Rope | None = None

    def prepare(self, step: Step) -> None:
        """Nothing: slots are read off the leases."""

    def of_step(self, step: Step, tensors: StepTensors, route: Route) -> CachedPass:
        """The pass of `step`, whose tokens have the roles of `route`."""
        device = self.pools.key.device
        pieces, rows, slots, low_slots, at = [], [], [], [], 0
        for piece in step.pieces:
            lease, size = piece.sequence.held, piece.end - piece.start
            low = (lease.lr_slots if step.low_apart else lease.base_slots)[: piece.end]
            first_new = max(lease.base_reused, piece.start)
            rows.append(np.arange(at + first_new - piece.start, at + size))
            slots.append(lease.base_slots[first_new : piece.end])
            low_slots.append(low[piece.start :])
            pieces.append(
                CachedPiece(
                    slice(at, at + size),
                    piece.end,
                    as_rows(lease.base_slots[: piece.end], device),
                    as_rows(low, device),
                    _readers(step.roles[at : at + size], device),
                )
            )
            at += size
        return CachedPass(
            self.pools,
            tuple(pieces),
            step.base_from,
            route,
            Writes(as_rows(np.concatenate(rows), device), as_rows(np.concatenate(slots), device)),
            Writes(slice(0, at), as_rows(np.concatenate(low_slots), device)),
            self.rope,
        )


def _readers(roles: Ints, device: torch.device) -> torch.Tensor | int:
    """The role of all tokens where they have one, else each one's."""
    first = int(roles[0])
    return first if (roles == first).all() else torch.as_tensor(roles, dtype=torch.long, device=device)
