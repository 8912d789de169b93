"""A cache of random contents at a model's shapes, to measure the kernels on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lragent.kernels.cached import (
    CachedBatch,
    LayerCache,
    Readers,
    Span,
    cached_attention_reference,
)

HEADS, KV_HEADS, DIM = 32, 8, 128
"""Llama-3.1-8B's."""

ROLES = 3

CHECKED = 64
"""New tokens of each end of a long chunk that are compared with the definition, which is slow."""


@dataclass
class CachedProblem:
    """New tokens of some sequences over contexts in randomly placed slots; several layers, so that none stays in L2.

    query: [T, HEADS, DIM]; caches: one for each layer.
    """

    query: torch.Tensor
    caches: list[LayerCache]
    batch: CachedBatch
    readers: Readers

    @classmethod
    def random(
        cls,
        new: Sequence[int],
        context: Sequence[int],
        device: torch.device,
        *,
        rank_v: int = 0,
        rank_k: int = 0,
        normalised: bool = False,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> CachedProblem:
        """new, context: of each sequence; its role is one of ROLES, in turn."""
        slots, longest, sequences = sum(context), max(context), len(new)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=dtype, device=device)

        table = torch.zeros(sequences, longest, dtype=torch.int32, device=device)
        shuffled = torch.randperm(slots, device=device).int()
        for s, part in enumerate(shuffled.split(list(context))):
            table[s, : len(part)] = part
        starts = torch.tensor([0, *new]).cumsum(0)
        spans = tuple(
            Span(int(starts[s]), int(starts[s + 1]), context[s], s, 1 + s % ROLES) for s in range(sequences) if new[s]
        )
        each = torch.tensor([1 + s % ROLES for s in range(sequences)])
        batch = CachedBatch(
            query_start=starts.int().to(device),
            context=torch.tensor(context, dtype=torch.int32, device=device),
            rows=torch.arange(sequences, dtype=torch.int32, device=device),
            slots=table,
            low_slots=table,
            roles=each.repeat_interleave(torch.tensor(new)).int().to(device),
            most_new=max(new),
            spans=spans,
        )
        angle = torch.arange(longest + 256, device=device).unsqueeze(1) * 500_000.0 ** -torch.linspace(
            0, 1, DIM // 2, dtype=torch.float64, device=device
        )
        rope = tuple(torch.cat((x, x), dim=1).float() for x in (angle.cos(), angle.sin()))
        width = KV_HEADS * DIM
        return cls(
            query=normal(sum(new), HEADS, DIM),
            caches=[
                LayerCache(
                    normal(KV_HEADS, slots, DIM),
                    normal(KV_HEADS, slots, DIM),
                    normal(slots, rank_v) if rank_v else None,
                    normal(slots, rank_k) if rank_k else None,
                )
                for _ in range(layers)
            ],
            batch=batch,
            readers=Readers(
                normal(ROLES, rank_v, width) / 4 if rank_v else None,
                normal(ROLES, rank_k, width) / 8 if rank_k else None,
                rope=(rope[0], rope[1]) if rank_k else None,
                key_norm=1 + normal(DIM).float() / 8 if normalised else None,
            ),
        )

    @property
    def scale(self) -> float:
        """That of the scores."""
        return DIM**-0.5

    @property
    def bytes(self) -> int:
        """Read of one layer's cache: keys, values and LR, each once."""
        cache = self.caches[0]
        width = 2 * KV_HEADS * DIM + sum(low.shape[1] for low in (cache.low_v, cache.low_k) if low is not None)
        return int(self.batch.context.sum()) * width * self.query.element_size()

    @property
    def operations(self) -> float:
        """Of one layer's causal attention, without its low-rank part."""
        spans = self.batch.spans or ()
        pairs = sum((s.end - s.start) * (s.context - (s.end - s.start - 1) / 2) for s in spans)
        return 4 * pairs * HEADS * DIM

    def error(self, out: torch.Tensor) -> float:
        """Of the last layer's attention, as a share of its norm; of long chunks only both ends are compared."""
        parts = []
        for s, (start, end) in enumerate(self.batch.query_start.unfold(0, 2, 1).tolist()):
            context, fresh = int(self.batch.context[s]), end - start
            ends = [(start, end)] if fresh <= 2 * CHECKED else [(start, start + CHECKED), (end - CHECKED, end)]
            parts += [(s, a, b, context - (end - b)) for a, b in ends if b > a]
        wrong = right = 0.0
        for s, start, end, context in parts:
            batch = replace(
                self.batch,
                query_start=torch.tensor([0, end - start], dtype=torch.int32),
                context=torch.tensor([context], dtype=torch.int32),
                rows=self.batch.rows[s : s + 1],
                roles=self.batch.roles[start:end],
            )
            exact = cached_attention_reference(
                self.query[start:end], self.caches[-1], batch, self.readers, scale=self.scale
            )
            wrong += float((out[start:end].float() - exact).square().sum())
            right += float(exact.square().sum())
        return float((wrong / right) ** 0.5)
