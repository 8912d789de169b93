"""Flash-LoRA-Attention over many short trajectories laid end to end, with a few dense products for all of them.

Attending one trajectory after the other costs some dozens of small operations for each, at every layer; in training on
short trajectories that takes as long as the products themselves. Here trajectories of like length are padded to one
length and attended together. Padding stands at the end, where causality already hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lragent.kernels.attention import visible
from lragent.kernels.low_rank import role_up_heads

SCORES_LIMIT = 1 << 20
"""A group writes out at most this many scores per head (N * L * L); longer trajectories go to torch's own attention."""

MULTIPLE = 32
"""Lengths are rounded up to this: torch's bfloat16 softmax on a CPU is three times slower where vectors do not fit."""

SHORTEST = 0.7
"""A trajectory shorter than this share of the longest in its group would be mostly padding: it opens a new group."""


@dataclass(frozen=True)
class PackedLayout:
    """How the T tokens of a flat batch are padded to P places: worked out once, used by every layer.

    shapes: (N, L) of each group: N trajectories padded to L. take: [P], the token at every place, where padding repeats
    a trajectory's first. place: [T], where each token went.
    """

    shapes: tuple[tuple[int, int], ...]
    take: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], device: torch.device) -> PackedLayout:
        """Group the half-open `spans`, which cover 0..T in order, by length."""
        groups: list[list[tuple[int, int]]] = []
        for start, end in sorted(spans, key=lambda span: span[0] - span[1]):  # longest first
            if groups:
                longest = groups[-1][0][1] - groups[-1][0][0]
                scores = (len(groups[-1]) + 1) * longest**2
                if end - start >= SHORTEST * longest and scores <= SCORES_LIMIT:
                    groups[-1].append((start, end))
                    continue
            groups.append([(start, end)])
        shapes, take, place, filled = [], [], torch.empty(spans[-1][1], dtype=torch.long), 0
        for group in groups:
            length = -(-(group[0][1] - group[0][0]) // MULTIPLE) * MULTIPLE
            shapes.append((len(group), length))
            steps = torch.arange(length)
            for start, end in group:
                place[start:end] = filled + steps[: end - start]
                take.append(start + steps.where(steps < end - start, 0))
                filled += length
        return cls(tuple(shapes), torch.cat(take).to(device), place.to(device))


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    roles: torch.Tensor,
    layout: PackedLayout,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`lora_attention` of each trajectory alone. Differentiable; any device.

    query: [Hq, T, D]; key, value: [Hkv, T, D]; low: [T, r]; up: [n_roles, r, Hkv * D]; roles: [T], the readers.
    Returns [T, Hq, D].
    """
    heads, tokens, dim = query.shape
    kv_heads = key.shape[0]
    # The LR columns stand beside the values, so that one product attends to both.
    wide = value if low is None else torch.cat((value, low.to(value.dtype).expand(kv_heads, tokens, -1)), dim=-1)
    flat = [states.transpose(0, 1).flatten(1) for states in (query, key, wide)]  # [T, H * D] each
    padded = [_Pad.apply(states, layout.take, layout.place) for states in flat]
    sizes = [count * length for count, length in layout.shapes]
    groups = zip(*(states.split(sizes) for states in padded), layout.shapes, strict=True)
    parts = [_attend_group(q, k, v, heads, kv_heads, length, scale, window) for q, k, v, (_, length) in groups]
    out = _Unpad.apply(torch.cat(parts), layout.place).view(tokens, heads, -1)
    if low is None or up is None:
        return out
    out, low_out = out.split((dim, low.shape[-1]), dim=-1)
    low_out = low_out.transpose(0, 1).reshape(kv_heads, heads // kv_heads, tokens, -1)
    added = role_up_heads(low_out.to(up.dtype), up, roles).reshape(heads, tokens, dim).transpose(0, 1)
    return out + added.to(out.dtype)


class _Pad(torch.autograd.Function):
    """[T, C] to [P, C]. Padding has no gradient (nothing reads it), so that the backward is a plain gather."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, take: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return states.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Unpad(torch.autograd.Function):
    """[P, C] to [T, C]; the inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.places = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, grad.shape[1]).index_copy_(0, place, grad), None


def _attend_group(
    query: torch.Tensor,
    key: torch.Tensor,
    wide: torch.Tensor,
    heads: int,
    kv_heads: int,
    length: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """query: [N * L, Hq * D]; key: [N * L, Hkv * D]; wide: [N * L, Hkv * W]. Returns [N * L, Hq * W]."""
    count, group = query.shape[0] // length, heads // kv_heads
    hidden = ~visible(length, length, query.device, None, window)
    bias = torch.zeros(length, length, dtype=query.dtype, device=query.device).masked_fill(hidden, float("-inf"))
    if count * length**2 > SCORES_LIMIT:
        apart = ((query, heads), (key, kv_heads), (wide, kv_heads))
        q, k, v = (states.view(count, length, n, -1).transpose(1, 2) for states, n in apart)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=group > 1)
        return out.transpose(1, 2).reshape(count * length, -1)
    queries = query.view(count, length, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(count * kv_heads, group * length, -1)  # a query's heads of one group share a key head
    keys, values = (
        states.view(count, length, kv_heads, -1).transpose(1, 2).reshape(count * kv_heads, length, -1)
        for states in (key, wide)
    )
    scores = torch.baddbmm(bias.repeat(group, 1), queries, keys.transpose(1, 2), alpha=scale)  # [N * Hkv, G * L, L]
    out = torch.bmm(torch.softmax(scores, dim=-1), values)
    out = out.view(count, kv_heads, group, length, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(count * length, -1)
