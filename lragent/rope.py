"""Rotary position embedding of low-rank keys.

Rotation is linear per position, so a key's low-rank part may be rotated apart:
`RoPE(K_base + d) = RoPE(K_base) + RoPE(d)`. The angles come from the model's own rotary module, so that every
scaling rule of transformers holds here too.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, [T, D] each, for T positions."""


def rope_at(model: PreTrainedModel, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
    """The angles of `positions` [T] from the model's rotary embedding."""
    probe = torch.empty(0, dtype=dtype, device=positions.device)
    cos, sin = model.get_decoder().rotary_emb(probe, position_ids=positions.unsqueeze(0))
    return cos[0], sin[0]


def rotate(states: torch.Tensor, rope: Rope) -> torch.Tensor:
    """states: [H, T, D], the two halves of D rotated against each other as in Llama, Mistral and Qwen."""
    cos, sin = rope
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
