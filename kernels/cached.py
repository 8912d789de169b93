"""Attention through the cache: what a step reads, and its definition in plain torch.

A batch is a flat run of new tokens of several sequences. Each sequence's whole context, its new tokens included, lies
in slots of the layer's pools; a table says where. Keys and values are decomposed (see `kernels.attention`): a query of
role j reads `V = V_base + LR_v B_j`, and where `k_proj` is adapted `K = K_base + RoPE(LR_k B_j)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.kernels.checks import FLOATS, Arguments, check_rank

LEAST_ANGLES = 64
"""Rows that tables of angles must have: keys are rotated by their offset in a tile, whatever the context's length."""

MOST_SCORES = 1 << 26
"""The definition writes out at most this many scores at once."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's pools.

    key, value: [Hkv, slots, D], any strides but the last, so that they may be laid out by head or by token. low_v,
    low_k: [lr_slots, r], None where that projection has no LR cache.
    """

    key: torch.Tensor
    value: torch.Tensor
    low_v: torch.Tensor | None = None
    low_k: torch.Tensor | None = None


@dataclass(frozen=True)
class Readers:
    """What one layer's roles add to the cache when they read it.

    up_v, up_k: [n_roles, r, Hkv * D], each role's `B` transposed, scaling folded in; None where there is no LR cache.
    rope: cos and sin, [positions, D] float32 each, needed with `up_k`. key_norm: [D] float32, for models that normalise
    their keys after projection: the pool then holds raw keys, which are normalised (`key_eps`) and rotated when read.
    """

    up_v: torch.Tensor | None = None
    up_k: torch.Tensor | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    key_norm: torch.Tensor | None = None
    key_eps: float = 1e-6


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence and one role, as the host knows them: flat tokens start..end, and how long the context
    is at the last of them; row: the sequence's row in the slot tables."""

    start: int
    end: int
    context: int
    row: int
    role: int


@dataclass(frozen=True)
class CachedBatch:
    """The sequences of one step, the same for all layers. All tensors are int32, so that a captured graph reads new
    ones.

    query_start: [S + 1], sequence s has the flat tokens query_start[s]..query_start[s + 1]; may be none. context: [S],
    tokens of its context, the new ones (its last) included. rows: [S], its row in the slot tables. slots, low_slots:
    [rows, C], where token n of the context lies in the base pools and in the LR pools (one tensor where both lie
    alike). roles: [T], the reader of each new token, 0 = base. most_new: at least the largest number of new tokens of a
    sequence. spans: the same on the host, where it is known there: all new tokens cut into runs of one sequence and one
    role. They let long chunks be laid out for a faster kernel, and must be None while a graph is captured.
    """

    query_start: torch.Tensor
    context: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    low_slots: torch.Tensor
    roles: torch.Tensor
    most_new: int
    spans: tuple[Span, ...] | None = None


def check_cached(query: torch.Tensor, cache: LayerCache, batch: CachedBatch, readers: Readers) -> Arguments:
    """Check the tensors of one call against each other. Raises ValueError naming the argument."""
    sizes = Arguments(query.device)
    sizes.tensor("query", query, "T Hq D", FLOATS)
    dtype = query.dtype
    sizes.tensor("cache.key", cache.key, "Hkv slots D", dtype)
    sizes.tensor("cache.value", cache.value, "Hkv slots D", dtype)
    if sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"query: its {sizes['Hq']} heads must be a multiple of the cache's {sizes['Hkv']}.")
    for name in ("v", "k"):
        low, up = getattr(cache, f"low_{name}"), getattr(readers, f"up_{name}")
        if (low is None) != (up is None):
            raise ValueError(f"readers.up_{name}: goes with cache.low_{name}; give both or neither.")
        if low is not None:
            sizes.tensor(f"cache.low_{name}", low, f"lr_slots r{name}", dtype)
            check_rank(f"cache.low_{name}", sizes[f"r{name}"], 1 << 16)
            sizes.tensor(f"readers.up_{name}", up, f"n_roles r{name} {sizes['Hkv'] * sizes['D']}", dtype)
    if readers.up_k is not None:
        if readers.rope is None:
            raise ValueError("readers.rope: low-rank keys are rotated when read; give cos and sin.")
        sizes.tensor("readers.rope[0]", readers.rope[0], "positions D", torch.float32)
        sizes.tensor("readers.rope[1]", readers.rope[1], "positions D", torch.float32)
        if sizes["positions"] < LEAST_ANGLES:
            raise ValueError(f"readers.rope: must have at least {LEAST_ANGLES} positions, not {sizes['positions']}.")
    if readers.key_norm is not None:
        if readers.up_k is None:
            raise ValueError("readers.key_norm: raw keys are cached only where k_proj is adapted; give readers.up_k.")
        sizes.tensor("readers.key_norm", readers.key_norm, "D", torch.float32)
    sizes.tensor("batch.context", batch.context, "S", torch.int32)
    sizes.tensor("batch.query_start", batch.query_start, str(sizes["S"] + 1), torch.int32)
    sizes.tensor("batch.rows", batch.rows, "S", torch.int32)
    sizes.tensor("batch.slots", batch.slots, "rows C", torch.int32)
    sizes.tensor("batch.low_slots", batch.low_slots, "rows C", torch.int32)
    sizes.tensor("batch.roles", batch.roles, "T", torch.int32)
    if batch.most_new < 1 and sizes["T"]:
        raise ValueError(f"batch.most_new: must be at least 1, not {batch.most_new}.")
    return sizes


def role_keys(raw: torch.Tensor, delta: torch.Tensor | None, readers: Readers, positions: torch.Tensor) -> torch.Tensor:
    """The keys that a reader sees, in float32.

    raw: [Hkv, n, D] as cached; delta: [Hkv, n, D], `LR_k B`, or None for the base; positions: [n].
    """
    if readers.rope is None:
        return raw.float()
    cos, sin = (table[positions].float() for table in readers.rope)
    if readers.key_norm is None:
        return raw.float() if delta is None else raw.float() + _rotate(delta.float(), cos, sin)
    full = raw.float() if delta is None else raw.float() + delta.float()
    full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + readers.key_eps) * readers.key_norm
    return _rotate(full, cos, sin)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def cached_attention_reference(
    query: torch.Tensor,
    cache: LayerCache,
    batch: CachedBatch,
    readers: Readers,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The definition, in float32: every reader's keys and values are materialised. Returns [T, Hq, D] float32.

    query: [T, Hq, D]. Rows that belong to no sequence are NaN. Any device and any rank; copies lengths to the host.
    """
    out = torch.full(query.shape, float("nan"), dtype=torch.float32, device=query.device)
    starts, contexts, rows = batch.query_start.tolist(), batch.context.tolist(), batch.rows.tolist()
    for s, (context, row) in enumerate(zip(contexts, rows, strict=True)):
        start, end = starts[s], starts[s + 1]
        slots, low_slots = batch.slots[row, :context].long(), batch.low_slots[row, :context].long()
        for role in batch.roles[start:end].unique().tolist():
            keys, values = _as_read(cache, readers, slots, low_slots, role)
            chosen = (batch.roles[start:end] == role).nonzero().squeeze(-1)
            most = max(MOST_SCORES // (query.shape[1] * context), 1)
            for some in chosen.split(most):
                asked = query[start + some].transpose(0, 1).float()  # [Hq, n, D]
                group = asked.shape[0] // keys.shape[0]
                scores = asked @ keys.repeat_interleave(group, dim=0).transpose(1, 2) * scale  # [Hq, n, C]
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                distance = (context - (end - start) + some).unsqueeze(-1) - torch.arange(context, device=query.device)
                hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
                weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
                out[start + some] = (weights @ values.repeat_interleave(group, dim=0)).transpose(0, 1)
    return out


def _as_read(
    cache: LayerCache, readers: Readers, slots: torch.Tensor, low_slots: torch.Tensor, role: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [Hkv, C, D] float32 of the context at `slots` [C], as `role` reads them."""
    kv_heads, _, dim = cache.key.shape
    context = len(slots)
    positions = torch.arange(context, device=slots.device)

    def delta(low: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor | None:
        if low is None or up is None or role == 0:
            return None
        added = low[low_slots].float() @ up[role - 1].float()  # [C, Hkv * D]
        return added.view(context, kv_heads, dim).transpose(0, 1)

    keys = role_keys(cache.key[:, slots], delta(cache.low_k, readers.up_k), readers, positions)
    values, added = cache.value[:, slots].float(), delta(cache.low_v, readers.up_v)
    return keys, values if added is None else values + added
