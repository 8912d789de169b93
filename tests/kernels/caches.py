"""Caches as an engine leaves them, for tests: shuffled slots, a longer table than needed, NaN wherever nothing is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lragent.kernels.cached import CachedBatch, LayerCache, Readers, Span

NAN = float("nan")
NOWHERE = 1 << 30
"""What slot tables hold past a context's end: whoever reads it fails."""


@dataclass(frozen=True)
class Case:
    """new, context: per sequence, new tokens and context with them. rank_v, rank_k: 0 = not adapted. roles: how many;
    mixed: whether tokens of one sequence differ in role. apart: whether LR slots differ from base slots."""

    new: tuple[int, ...] = (1, 3, 8)
    context: tuple[int, ...] = (33, 3, 40)
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    rank_v: int = 4
    rank_k: int = 0
    normalised: bool = False
    roles: int = 3
    mixed: bool = True
    apart: bool = False
    by_token: bool = False
    window: int | None = None
    softcap: float | None = None
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


@dataclass
class Cached:
    query: torch.Tensor
    cache: LayerCache
    batch: CachedBatch
    readers: Readers

    @property
    def arguments(self) -> tuple:
        return self.query, self.cache, self.batch, self.readers


def rope_tables(length: int, dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles as a model's rotary embedding gives them, with a scaling of attention as YaRN has."""
    angle = torch.arange(length).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, dim // 2).double().unsqueeze(0)
    cos, sin = (1.2 * torch.cat((part, part), dim=1).float().to(device) for part in (angle.cos(), angle.sin()))
    return cos, sin


def make_cached(case: Case, dtype: torch.dtype, device: str) -> Cached:
    draw = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    tokens, slots, longest = sum(case.new), sum(case.context) + 7, max(case.context, default=0) + 3
    sequences = len(case.new)

    def table() -> torch.Tensor:
        shuffled = torch.randperm(slots, generator=draw)
        out, at = torch.full((sequences + 2, longest), NOWHERE, dtype=torch.int32), 0
        for row, length in zip(rows.tolist(), case.context, strict=True):
            out[row, :length] = shuffled[at : at + length]
            at += length
        return out.to(device)

    rows = torch.randperm(sequences + 2, generator=draw)[:sequences].int()
    base = table()
    low = table() if case.apart else base

    def pool(where: torch.Tensor, *width: int) -> torch.Tensor:
        out = torch.full((slots, *width), NAN, dtype=dtype, device=device)
        used = where[where != NOWHERE].long()
        out[used] = random(len(used), *width)
        return out

    key, value = (pool(base, case.kv_heads, case.dim).transpose(0, 1) for _ in range(2))
    if not case.by_token:
        key, value = key.contiguous(), value.contiguous()
    # What an adapter adds to keys is a small part of them (cosine of 0.98 to 0.99 in the paper), and is rounded like
    # them.
    up_v, up_k = (random(case.roles, max(r, 1), case.kv_heads * case.dim) for r in (case.rank_v, case.rank_k))
    ups = [up_v / 2 if case.rank_v else None, up_k / 8 if case.rank_k else None]
    lows = [pool(low, r) if r else None for r in (case.rank_v, case.rank_k)]
    roles = torch.randint(0, case.roles + 1, (tokens,), generator=draw).int()
    if not case.mixed:
        each = torch.randint(0, case.roles + 1, (sequences,), generator=draw).int()
        roles = each.repeat_interleave(torch.tensor(case.new))
    starts = torch.tensor([0, *case.new]).cumsum(0).int()
    return Cached(
        1.5 * random(tokens, case.kv_heads * case.group, case.dim),
        LayerCache(key, value, *lows),
        CachedBatch(
            starts.to(device),
            torch.tensor(case.context, dtype=torch.int32, device=device),
            rows.to(device),
            base,
            low,
            roles.to(device),
            max(case.new, default=0),
        ),
        Readers(
            *ups,
            rope=rope_tables(longest + 200, case.dim, device) if case.rank_k else None,
            key_norm=(1 + random(case.dim).float() / 4) if case.normalised else None,
        ),
    )


def with_spans(batch: CachedBatch) -> CachedBatch:
    """The same batch with its runs of one role known to the host."""
    spans = []
    starts, contexts, rows, roles = (x.tolist() for x in (batch.query_start, batch.context, batch.rows, batch.roles))
    for s, context in enumerate(contexts):
        begin, end = starts[s], starts[s + 1]
        at = begin
        for t in range(begin + 1, end + 1):
            if t == end or roles[t] != roles[at]:
                spans.append(Span(at, t, context - (end - t), rows[s], roles[at]))
                at = t
    return replace(batch, spans=tuple(spans))
