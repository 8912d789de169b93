"""The attention of one step through the cache, by the kernels: for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from lragent.kernels.cached import CachedBatch, LayerCache, Readers, Span
from lragent.kernels.ops import Way, cached_attention, choose_way, make_plan, write_cache
from lragent.key_norm import norm_eps
from lragent.rope import Rope
from lragent.routing import Route
from lragent.serve.cache.pools import CachePools
from lragent.serve.engine.new_states import CachePass, NewStates
from lragent.serve.engine.step import SHORT, Step
from lragent.serve.engine.step_tensors import StepTensors
from lragent.serve.engine.tables import SlotTables

if TYPE_CHECKING:
    from lragent.kernels.plan import Plan


@dataclass(frozen=True)
class Group:
    """Sequences of a step that are attended to together, in the tokens `start..end` of the flat batch.

    batch: its `query_start` counts from the group's first token.
    """

    start: int
    end: int
    batch: CachedBatch


@dataclass(frozen=True)
class KernelPass(CachePass):
    """The attention of one step (see CachePass).

    positions: [T] int32. base_slots, low_slots: [T] int32, where each new token's base and LR cache are written, -1
    where they are not. rope: cos and sin of every position, float32. way, write, norms: see KernelAttention.
    """

    pools: CachePools
    groups: tuple[Group, ...]
    route: Route
    base_from: int
    counted: torch.Tensor
    """[T] int32: 0, 1, 2 …"""
    base_slots: torch.Tensor
    low_slots: torch.Tensor
    rope: Rope | None
    way: Way | None
    write: Callable[..., None]
    norms: dict[int, tuple[torch.Tensor, float]]
    _divided: dict[tuple[int, int | None, float | None, int, int], tuple[Way, Plan | None]] = field(
        default_factory=dict
    )
    """How the work is done and divided, by group and what may differ from layer to layer: window, soft cap, ranks."""

    def through_cache(
        self, index: int, new: NewStates, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """See CachePass."""
        pools, low_v, low_k = self.pools, new.low_v, new.low_k
        cache = LayerCache(
            pools.key[index],
            pools.value[index],
            None if low_v is None or pools.low_v is None else pools.low_v[index],
            None if low_k is None or pools.low_k is None else pools.low_k[index],
        )
        # The angles are those of the new tokens in order, not of all positions.
        self.write(
            new.query, new.key, new.value, low_v, low_k, new.rope, self.counted, self.base_slots, self.low_slots, cache,
            rotate_key=new.norm is None,
        )  # fmt: skip
        readers = Readers(new.up_v, new.up_k, None if new.up_k is None else self.rope)
        if new.norm is not None:
            weight, eps = self._norm(index, new.norm)
            readers = replace(readers, key_norm=weight, key_eps=eps)
        parts = []
        for number, group in enumerate(self.groups):
            query = new.query[group.start : group.end]
            way, plan = self._division(number, query, cache, group.batch, window, softcap)
            parts.append(
                cached_attention(
                    query, cache, group.batch, readers, scale=scale, window=window, softcap=softcap, plan=plan, way=way
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _norm(self, index: int, norm: nn.Module) -> tuple[torch.Tensor, float]:
        if index not in self.norms:
            weight, eps = norm.weight, norm_eps(norm)
            assert isinstance(weight, torch.Tensor), "build_engine refuses other norms"
            assert eps is not None, "build_engine refuses other norms"
            self.norms[index] = weight.float(), eps
        return self.norms[index]

    def _division(
        self,
        number: int,
        query: torch.Tensor,
        cache: LayerCache,
        batch: CachedBatch,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Way, Plan | None]:
        rank_v, rank_k = (0 if low is None else low.shape[1] for low in (cache.low_v, cache.low_k))
        alike = (number, window, softcap, rank_v, rank_k)
        if alike not in self._divided:
            way = self.way or choose_way(query, cache, batch, window, softcap)
            self._divided[alike] = way, make_plan(query, cache, batch, window=window, way=way)
        return self._divided[alike]


@dataclass(frozen=True)
class KernelAttention:
    """Makes the passes of one model. rope: cos and sin of every position, float32, where `k_proj` is split.

    way: overrules the choice of the way. write: does what `write_cache` does, and does by default. norms: by layer,
    the weight [D] float32 and the eps of the norm of keys, made when first asked for.
    """

    pools: CachePools
    tables: SlotTables
    rope: Rope | None = None
    way: Way | None = None
    write: Callable[..., None] = write_cache
    norms: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict)

    def prepare(self, step: Step) -> None:
        """Tell the device where the tokens of `step` lie."""
        self.tables.update(step.pieces)

    def of_step(self, step: Step, tensors: StepTensors, route: Route) -> KernelPass:
        """The pass of `step`, whose numbers are in `tensors`; long pieces are attended to apart from short ones."""
        bounds = [0, step.short_from, len(step.pieces)]
        groups = []
        for first, past in pairwise(bounds):
            if first == past:
                continue
            start, end = int(step.query_start[first]), int(step.query_start[past])
            most_new = max(piece.end - piece.start for piece in step.pieces[first:past])
            spans = _spans(step, first, past) if most_new > SHORT else None
            query_start, context = tensors.query_start[first : past + 1], tensors.context[first:past]
            rows, roles = tensors.rows[first:past], tensors.roles[start:end]
            if start:  # copies, which begin at addresses that kernels are compiled for
                query_start = query_start - start
                context, rows, roles = context.clone(), rows.clone(), roles.clone()
            batch = CachedBatch(query_start, context, rows, self.tables.base, self.tables.low, roles, most_new, spans)
            groups.append(Group(start, end, batch))
        return self._pass(tuple(groups), tensors, route, step.base_from)

    def of_tensors(self, tensors: StepTensors, most_new: int, route: Route) -> KernelPass:
        """The pass of whatever step the tensors hold when it runs, of at most `most_new` tokens a sequence."""
        batch = CachedBatch(
            tensors.query_start, tensors.context, tensors.rows, self.tables.base, self.tables.low, tensors.roles,
            most_new,
        )  # fmt: skip
        return self._pass((Group(0, len(tensors.tokens), batch),), tensors, route, 0)

    def _pass(self, groups: tuple[Group, ...], tensors: StepTensors, route: Route, base_from: int) -> KernelPass:
        counted = torch.arange(len(tensors.tokens), dtype=torch.int32, device=tensors.tokens.device)
        return KernelPass(
            self.pools, groups, route, base_from, counted, tensors.base_slots, tensors.low_slots, self.rope, self.way,
            self.write, self.norms,
        )  # fmt: skip


def _spans(step: Step, first: int, past: int) -> tuple[Span, ...]:
    """The longest runs of one sequence and one role of some pieces; tokens count from the first of them."""
    spans = []
    offset = int(step.query_start[first])
    for row, piece in enumerate(step.pieces[first:past], start=first):
        at, end_at = int(step.query_start[row]), int(step.query_start[row + 1])
        roles = step.roles[at:end_at]
        ends = [*(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(roles)]
        for start, end in zip([0, *ends], ends, strict=False):
            context = piece.end - len(roles) + end
            spans.append(Span(at - offset + start, at - offset + end, context, piece.sequence.row, int(roles[start])))
    return tuple(spans)
