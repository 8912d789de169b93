"""Flash-LoRA-Attention in plain torch: attention over decomposed values, which never expands the low-rank part.

Attention is linear in its values, so with `V = V_base + LR B` (B of the *reader*):
`O = P V_base + (P LR) B`, with `P = softmax(q K^T / sqrt(D))` (Flash-LoRA-Attention of LRAgent, arXiv 2602.01053).

Shapes: query [Hq, Tq, D]; key, value [Hkv, Tk, D]; low [Tk, r], the LR cache; up [n_roles, r, Hkv * D], the roles' `B`
transposed, scaling folded in; roles [Tq], the reader of each query, 0 = base
(an int where all queries have the same). Queries sit at the end of the context
unless `positions` [Tq] says where; keys sit at 0..Tk-1. `window` is the sliding window of Mistral: a query sees itself
and the `window - 1` tokens before it. With `softcap`, scores become `softcap * tanh(score / softcap)`, and are always
written out. Results are [Tq, Hq, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lragent.kernels.low_rank import role_up_heads, role_up_reference

EXPLICIT_SCORES_LIMIT = 1 << 24
"""Above this many scores (Hq * Tq * Tk) they are not written out, where torch has a fused attention."""


def visible(
    tokens: int, keys: int, device: torch.device, positions: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """The causal mask [Tq, Tk] as booleans: True where a query may look."""
    if positions is None:
        positions = torch.arange(keys - tokens, keys, device=device)
    distance = positions.unsqueeze(-1) - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def lora_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    roles: torch.Tensor | None = None,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The definition, in float32: materialise each reader's values, then plain attention. See the module for shapes."""
    heads, tokens, dim = query.shape
    kv_heads, keys, _ = key.shape
    mask = visible(tokens, keys, query.device, positions, window)
    out = torch.empty(tokens, heads, dim, dtype=torch.float32, device=query.device)
    for t in range(tokens):
        full = value.float()
        if low is not None and up is not None and roles is not None:
            delta = role_up_reference(low, up, roles[t].expand(keys))  # [Tk, Hkv * D]
            full = full + delta.reshape(keys, kv_heads, dim).transpose(0, 1)
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = (key[kv].float() @ query[h, t].float()) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, h] = torch.softmax(scores.masked_fill(~mask[t], float("-inf")), dim=0) @ full[kv]
    return out


def lora_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    roles: torch.Tensor | int | None = None,
    *,
    scale: float,
    positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention over `[V_base | LR]`, with the reader's `B` applied once per query. Differentiable; any device.

    Without `low`, `up` and `roles` it is plain causal attention with grouped queries. See the module for shapes.
    """
    if up is None or roles is None or (isinstance(roles, int) and roles == 0):
        low = None  # nobody reads it
    heads, tokens, dim = query.shape
    kv_heads, keys, _ = key.shape
    group = heads // kv_heads
    mask = None
    if tokens > 1 or positions is not None or (window is not None and keys > window):
        mask = visible(tokens, keys, query.device, positions, window)
    if softcap is None and heads * tokens * keys > EXPLICIT_SCORES_LIMIT:  # torch's own attention knows no cap
        return _widened(query, key, value, low, up, roles, scale, mask)

    folded = query.reshape(kv_heads, group * tokens, dim)  # a query's heads of one group share a key head
    scores = torch.bmm(folded, key.transpose(1, 2)) * scale  # [Hkv, G * Tq, Tk]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.view(kv_heads, group, tokens, keys).masked_fill(~mask, float("-inf"))
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact).to(value.dtype).view(kv_heads, group * tokens, keys)
    out = torch.bmm(weights, value).view(kv_heads, group, tokens, dim)
    if low is not None and up is not None and roles is not None:
        low_out = (weights.reshape(-1, keys) @ low).view(kv_heads, group, tokens, -1)
        out = out + role_up_heads(low_out.to(up.dtype), up, roles).to(out.dtype)
    return out.reshape(heads, tokens, dim).transpose(0, 1)


def _widened(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    roles: torch.Tensor | int | None,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """The same through torch's fused attention, with the LR columns set beside the values."""
    heads, tokens, dim = query.shape
    kv_heads, keys, _ = key.shape
    group = heads // kv_heads
    wide = value if low is None else torch.cat((value, low.to(value.dtype).expand(kv_heads, keys, -1)), dim=-1)
    out = F.scaled_dot_product_attention(
        query.unsqueeze(0), key.unsqueeze(0), wide.unsqueeze(0), attn_mask=mask, scale=scale, enable_gqa=group > 1
    )[0]
    if low is not None and up is not None and roles is not None:
        low_out = out[..., dim:].reshape(kv_heads, group, tokens, -1)
        added = role_up_heads(low_out.to(up.dtype), up, roles).reshape(heads, tokens, dim)
        out = out[..., :dim] + added.to(out.dtype)
    return out.transpose(0, 1)
