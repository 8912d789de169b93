"""The attention of one step through the cache, by the kernels: for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from lragent.attention import split_keys, split_projection
from lragent.kernels.cached import CachedBatch, LayerCache, Readers, Span
from lragent.kernels.ops import Way, cached_attention, choose_way, make_plan, write_cache
from lragent.key_norm import norm_eps
from lragent.rope import Rope
from lragent.routing import Route
from lragent.serve.cache.pools import CachePools
from lragent.serve.cache.slots import Slots
from lragent.serve.engine.step import Step

if TYPE_CHECKING:
    from lragent.kernels.plan import Plan

TABLE_MULTIPLE = 64
"""Rows of the slot tables have a multiple of this many numbers: kernels are compiled for aligned rows, once."""


@dataclass(frozen=True)
class KernelPass:
    """The attention of one step (see lragent.attention.AttentionPass).

    positions: [T] int32. base_slots, low_slots: [T] int32, where each new token's base and LR cache are written, -1
    where they are not. rope: cos and sin of every position, float32. way, write, norms: see KernelAttention.
    """

    pools: CachePools
    batch: CachedBatch
    route: Route
    positions: torch.Tensor
    base_slots: torch.Tensor
    low_slots: torch.Tensor
    rope: Rope | None
    way: Way | None
    write: Callable[..., None]
    norms: dict[int, tuple[torch.Tensor, float]]
    _divided: dict[tuple[int | None, float | None, int, int], tuple[Way, Plan | None]] = field(default_factory=dict)
    """How the work is done and divided, by what may differ from layer to layer: window, soft cap and ranks."""

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
        low_v, low_k = (None if part is None else part.take_low()[0] for part in (v_proj, k_proj))
        pools = self.pools
        cache = LayerCache(
            pools.key[index],
            pools.value[index],
            None if low_v is None or pools.low_v is None else pools.low_v[index],
            None if low_k is None or pools.low_k is None else pools.low_k[index],
        )
        key, norm = (key, None) if k_proj is None else split_keys(layer, k_proj, key)
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))  # [T, H, D]
        self.write(query, key, value, low_v, low_k, None, self.positions, self.base_slots, self.low_slots, cache)
        readers = Readers(
            v_proj.reader_up() if v_proj else None,
            k_proj.reader_up() if k_proj else None,
            self.rope if k_proj else None,
        )
        if norm is not None:
            weight, eps = self._norm(index, norm)
            readers = replace(readers, key_norm=weight, key_eps=eps)
        way, plan = self._division(query, cache, window, softcap)
        return cached_attention(
            query, cache, self.batch, readers, scale=scale, window=window, softcap=softcap, plan=plan, way=way
        )

    def _norm(self, index: int, norm: nn.Module) -> tuple[torch.Tensor, float]:
        if index not in self.norms:
            weight, eps = norm.weight, norm_eps(norm)
            assert isinstance(weight, torch.Tensor), "build_engine refuses other norms"
            assert eps is not None, "build_engine refuses other norms"
            self.norms[index] = weight.float(), eps
        return self.norms[index]

    def _division(
        self, query: torch.Tensor, cache: LayerCache, window: int | None, softcap: float | None
    ) -> tuple[Way, Plan | None]:
        rank_v, rank_k = (0 if low is None else low.shape[1] for low in (cache.low_v, cache.low_k))
        alike = (window, softcap, rank_v, rank_k)
        if alike not in self._divided:
            way = self.way or choose_way(query, cache, self.batch, window, softcap)
            self._divided[alike] = way, make_plan(query, cache, self.batch, window=window, way=way)
        return self._divided[alike]


@dataclass(frozen=True)
class KernelAttention:
    """Makes the passes of one model. rope: cos and sin of every position, float32, where `k_proj` is split.

    way: overrules the choice of the way. write: does what `write_cache` does, and does by default. norms: by layer,
    the weight [D] float32 and the eps of the norm of keys, made when first asked for.
    """

    pools: CachePools
    rope: Rope | None = None
    way: Way | None = None
    write: Callable[..., None] = write_cache
    norms: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict)

    def __call__(self, step: Step, route: Route) -> KernelPass:
        """The pass of `step`, whose tokens have the roles of `route`."""
        device = self.pools.key.device
        base_slots = np.full(len(step.roles), -1, np.int32)
        low_slots = np.empty(len(step.roles), np.int32)
        for part in step.parts:
            base_slots[part.first_new : part.end] = part.base_slots[part.context - (part.end - part.first_new) :]
            low_slots[part.start : part.end] = part.low_slots[part.start - part.end :]
        return KernelPass(
            self.pools,
            _batch(step, route, device),
            route,
            torch.as_tensor(step.positions.astype(np.int32), device=device),
            torch.as_tensor(base_slots, device=device),
            torch.as_tensor(low_slots, device=device),
            self.rope,
            self.way,
            self.write,
            self.norms,
        )


def _batch(step: Step, route: Route, device: torch.device) -> CachedBatch:
    """The sequences of a step, each a row of the slot tables."""

    def ints(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    slots = _table([part.base_slots for part in step.parts], device)
    return CachedBatch(
        query_start=ints([0, *(part.end for part in step.parts)]),
        context=ints([part.context for part in step.parts]),
        rows=torch.arange(len(step.parts), dtype=torch.int32, device=device),
        slots=slots,
        low_slots=_table([part.low_slots for part in step.parts], device) if step.low_apart else slots,
        roles=route.short_roles,
        most_new=max(part.end - part.start for part in step.parts),
        spans=_spans(step),
    )


def _table(rows: list[Slots], device: torch.device) -> torch.Tensor:
    """[S, longest] int32, rounded up."""
    longest = max(len(row) for row in rows)
    table = np.zeros((len(rows), -(-longest // TABLE_MULTIPLE) * TABLE_MULTIPLE), np.int32)
    for filled, row in zip(table, rows, strict=True):
        filled[: len(row)] = row
    return torch.as_tensor(table, device=device)


def _spans(step: Step) -> tuple[Span, ...]:
    """The longest runs of one sequence and one role."""
    spans = []
    for row, part in enumerate(step.parts):
        roles = np.asarray(step.roles[part.start : part.end])
        ends = [*(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(roles)]
        for start, end in zip([0, *ends], ends, strict=False):
            context = part.context - len(roles) + end
            spans.append(Span(part.start + start, part.start + end, context, row, int(roles[start])))
    return tuple(spans)
