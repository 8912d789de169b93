"""The up-projection `B` for tokens of mixed roles.

Every role has its own `B`, all of one rank, stored transposed and with the scaling folded in: `up` [n_roles, r, d_out].
Role indices count from 1; index 0 is the base model, whose product is zero.
"""

from __future__ import annotations

import torch


def role_up_reference(low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
    """Token by token, in float32: the definition.

    low: [T, r]; up: [n_roles, r, d_out]; roles: [T] in 0..n_roles. Returns [T, d_out] float32.
    """
    out = torch.zeros(low.shape[0], up.shape[2], dtype=torch.float32, device=low.device)
    for t, role in enumerate(roles.tolist()):
        if role > 0:
            out[t] = low[t].float() @ up[role - 1].float()
    return out


def role_up(low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
    """One dense product for any mix of roles: `(onehot(role) x low) @ concat(up)`, inner size n_roles * r.

    low: [..., T, r]; up: [n_roles, r, d_out]; roles: [T] in 0..n_roles. Returns [..., T, d_out]; differentiable.
    """
    n_roles, rank, d_out = up.shape
    onehot = roles.unsqueeze(-1) == torch.arange(1, n_roles + 1, device=roles.device)  # [T, n_roles]
    spread = (onehot.unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2)  # [..., T, n_roles * r]
    return spread @ up.reshape(n_roles * rank, d_out)


def role_up_heads(low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor | int) -> torch.Tensor:
    """The same for attention's low-rank accumulator, whose `B` differs by KV head.

    low: [Hkv, G, T, r] (`P @ LR` per query head); up: [n_roles, r, Hkv * D]; roles: [T], or the one role of all.
    Returns [Hkv, G, T, D]; differentiable.
    """
    kv_heads, group, tokens, _ = low.shape
    n_roles, _, d_out = up.shape
    if isinstance(roles, int):
        if roles == 0:
            return low.new_zeros(kv_heads, group, tokens, d_out // kv_heads)
        spread, up = low, up[roles - 1]
    else:
        onehot = roles.unsqueeze(-1) == torch.arange(1, n_roles + 1, device=roles.device)  # [T, n_roles]
        spread = (onehot.unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2)  # [Hkv, G, T, n_roles * r]
    inner = spread.shape[-1]
    per_head = up.reshape(inner, kv_heads, d_out // kv_heads).transpose(0, 1)  # [Hkv, n_roles * r, D]
    out = torch.bmm(spread.reshape(kv_heads, group * tokens, inner), per_head)
    return out.reshape(kv_heads, group, tokens, d_out // kv_heads)
