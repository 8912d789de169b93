"""One step of the model over a flat batch of pieces, reading and writing the cache through slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lragent.attention import SplitProjection, attend_by_reader, split_projection
from lragent.kernels.attention import lora_attention
from lragent.modes import SharingMode
from lragent.rope import Rope, rope_at
from lragent.routing import Route, Router
from lragent.serve.cache.pools import CachePools
from lragent.serve.cache.slots import Slots
from lragent.serve.engine.sequence import Piece

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
    ) -> torch.Tensor:
        """See AttentionPass. Writes what is new, then reads the whole context of each piece."""
        index = int(layer.layer_idx)  # type: ignore[arg-type]  # transformers' attention layers all have it
        v_proj, k_proj = split_projection(layer, "v_proj", self.route), split_projection(layer, "k_proj", self.route)
        low_v = self._store_low(v_proj, self.pools.low_v, index)
        low_k = self._store_low(k_proj, self.pools.low_k, index)
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
                    scale=scale,
                    window=window,
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


class Runner:
    """Runs steps of one model in one sharing mode.

    split: the projections whose low-rank part attention applies. role_of: role index by writer tag; the engine keeps it
    up to date.
    """

    def __init__(
        self,
        model: nn.Module,
        router: Router,
        pools: CachePools,
        mode: SharingMode,
        split: frozenset[str],
        role_of: Mapping[int, int],
        max_context: int,
    ) -> None:
        self._model = model
        self._router = router
        self._pools = pools
        self._mode = mode
        self._split = split
        self._role_of = role_of
        self._device = pools.key.device
        self._rope = None
        if "k_proj" in split:
            self._rope = rope_at(model, torch.arange(max_context, device=self._device), pools.key.dtype)

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> torch.Tensor:
        """Process `pieces`. Returns [n, vocab]: logits after the last token of each piece that yields one, in order."""
        cached: list[CachedPiece] = []
        tokens: list[np.ndarray] = []
        roles: list[int] = []
        base_rows: list[np.ndarray] = []
        base_slots: list[np.ndarray] = []
        low_slots: list[np.ndarray] = []
        keep: list[int] = []
        at = 0
        for piece in pieces:
            lease, count = piece.sequence.held, piece.end - piece.start
            part = slice(piece.start, piece.end)
            tokens.append(lease.tokens[part])
            if self._mode is SharingMode.BASE_SHARED:  # an LR prefill processes others' tokens as the reader
                own = [piece.sequence.role.index] * count
            else:
                own = [self._role_of[tag] for tag in lease.tags[part].tolist()]
            first_new = max(piece.start, lease.base_reused)
            base_rows.append(np.arange(at + first_new - piece.start, at + count))
            base_slots.append(lease.base_slots[first_new : piece.end])
            low_of = lease.lr_slots if self._mode is SharingMode.BASE_SHARED else lease.base_slots
            low_slots.append(low_of[part])
            batch = slice(at, at + count)
            readers: torch.Tensor | int = own[0]
            if any(role != own[0] for role in own):
                readers = torch.tensor(own, device=self._device)
            cached.append(
                CachedPiece(
                    batch,
                    piece.end,
                    as_rows(lease.base_slots[: piece.end], self._device),
                    as_rows(low_of[: piece.end], self._device),
                    readers,
                )
            )
            roles += own
            at += count
            if piece.yields_token:
                keep.append(at - 1)
        route = Route.of(roles, self._device, self._split)
        attention_pass = CachedPass(
            self._pools,
            tuple(cached),
            route,
            Writes(as_rows(np.concatenate(base_rows), self._device), self._rows(base_slots)),
            Writes(slice(0, at), self._rows(low_slots)),
            self._rope,
        )
        positions = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
        with self._router.use(route):
            out = self._model(
                input_ids=torch.as_tensor(np.concatenate(tokens), device=self._device).unsqueeze(0),
                position_ids=torch.as_tensor(positions, device=self._device).unsqueeze(0),
                attention_pass=attention_pass,
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self._device),
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _rows(self, parts: list[np.ndarray]) -> Rows:
        return as_rows(np.concatenate(parts), self._device)
