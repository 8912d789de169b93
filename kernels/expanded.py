"""Long chunks through torch's own fused attention, over a context laid out once for the role that reads it.

Attention over n new tokens and L of context costs n * L; laying the context out, with the reader's `LR B` added to its
values and keys on the way, costs L. From some hundreds of new tokens on that is nothing, and cuDNN's kernel, which
needs plain contiguous tensors, is faster than one that gathers by slot. Scratch for one context of one layer is all it
takes: the cache itself stays decomposed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lragent.kernels.cached import CachedBatch, LayerCache, Readers, Span
from lragent.kernels.launch import padded
from lragent.kernels.tile import load_tile, load_up

CUDNN_DIMS = (64, 80, 96, 128)
"""Head dimensions that cuDNN takes here."""

FAR, NEAR = 2048, 256
"""cuDNN plans for every new shape, which takes the host tens of milliseconds, and torch keeps all plans. So shapes are
few: the context is cut at a multiple of FAR, what lies before is read by queries filled up to a multiple of NEAR, and
the rest, with the new tokens at its end, is one causal square filled up likewise."""


@triton.jit
def _expand_kernel(
    p_key, key_head_stride, p_value, value_head_stride, p_low_v, p_low_k, p_slots, p_low_slots,
    p_up_v, rank_v_stride, p_up_k, rank_k_stride, p_cos, p_sin, rope_stride, p_norm, key_eps,
    p_keys, p_values, context, kv_heads,
    key_stride: tl.constexpr, value_stride: tl.constexpr, low_v_stride: tl.constexpr, low_k_stride: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, RANK_V: tl.constexpr, RV: tl.constexpr,
    RANK_K: tl.constexpr, RK: tl.constexpr, ADAPTED: tl.constexpr, NORMALISED: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N tokens of one key head. ADAPTED: the reader is not the base. p_up_v, p_up_k: the reader's `B`."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kv = tl.program_id(1)
    there = o_n < context
    o_d, o_half, o_rv, o_rk = tl.arange(0, D), tl.arange(0, HALF), tl.arange(0, RV), tl.arange(0, RK)
    half: tl.constexpr = DIM // 2
    slots = tl.load(p_slots + o_n, mask=there, other=0)
    low_slots = tl.load(p_low_slots + o_n, mask=there, other=0)
    o_out = (o_n.to(tl.int64) * kv_heads + kv)[:, None] * DIM
    p_key += kv.to(tl.int64) * key_head_stride
    p_value += kv.to(tl.int64) * value_head_stride
    if KEYS:
        if RANK_K > 0:
            m_half = there[:, None] & (o_half < half)[None, :]
            p_rows = p_key + slots.to(tl.int64)[:, None] * key_stride + o_half[None, :]
            key1 = tl.load(p_rows, mask=m_half, other=0.0).to(tl.float32)
            key2 = tl.load(p_rows + half, mask=m_half, other=0.0).to(tl.float32)
            cos = tl.load(p_cos + o_n[:, None] * rope_stride + o_half[None, :], mask=m_half, other=0.0)
            sin = tl.load(p_sin + o_n[:, None] * rope_stride + o_half[None, :], mask=m_half, other=0.0)
            low_k = load_tile(p_low_k, low_slots, there, o_rk, low_k_stride, RANK_K, RANK_K < RK, True)  # [BN, RK]
            b_up1 = load_up(p_up_k + kv * DIM, ADAPTED + 0 * kv, 0, rank_k_stride, o_half, half, RANK_K, RK)
            b_up2 = load_up(p_up_k + kv * DIM + half, ADAPTED + 0 * kv, 0, rank_k_stride, o_half, half, RANK_K, RK)
            delta1 = tl.dot(low_k, b_up1, input_precision=PRECISION)
            delta2 = tl.dot(low_k, b_up2, input_precision=PRECISION)
            if NORMALISED:
                key1 += delta1
                key2 += delta2
                size = tl.rsqrt((tl.sum(key1 * key1, 1) + tl.sum(key2 * key2, 1)) / DIM + key_eps)[:, None]
                delta1 = key1 * size * tl.load(p_norm + o_half, mask=o_half < half, other=0.0)[None, :]
                delta2 = key2 * size * tl.load(p_norm + half + o_half, mask=o_half < half, other=0.0)[None, :]
                key1 = tl.zeros_like(key1)
                key2 = tl.zeros_like(key2)
            key1 += delta1 * cos - delta2 * sin
            key2 += delta2 * cos + delta1 * sin
            tl.store(p_keys + o_out + o_half[None, :], key1.to(p_keys.dtype.element_ty), mask=m_half)
            tl.store(p_keys + o_out + half + o_half[None, :], key2.to(p_keys.dtype.element_ty), mask=m_half)
        else:
            key = load_tile(p_key, slots, there, o_d, key_stride, DIM, DIM < D, True)
            tl.store(p_keys + o_out + o_d[None, :], key, mask=there[:, None] & (o_d < DIM)[None, :])
    if VALUES:
        value = load_tile(p_value, slots, there, o_d, value_stride, DIM, DIM < D, True)
        if RANK_V > 0 and ADAPTED:
            low_v = load_tile(p_low_v, low_slots, there, o_rv, low_v_stride, RANK_V, RANK_V < RV, True)  # [BN, RV]
            b_up = load_up(p_up_v + kv * DIM, 1 + 0 * kv, 0, rank_v_stride, o_d, DIM, RANK_V, RV)
            value = tl.dot(low_v, b_up, value.to(tl.float32), input_precision=PRECISION).to(p_values.dtype.element_ty)
        tl.store(p_values + o_out + o_d[None, :], value, mask=there[:, None] & (o_d < DIM)[None, :])


@triton.jit
def _join_kernel(
    p_out, out_stride, p_first, p_second, p_lse1, p_lse2, lse1_stride, lse2_stride,
    HEADS: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token's heads of two attentions over two parts of a context as one. Parts: [T, HEADS, DIM]."""
    t = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.arange(0, H), tl.arange(0, D)
    m_h = o_h < HEADS
    lse1 = tl.load(p_lse1 + o_h * lse1_stride + t, mask=m_h, other=0.0)
    lse2 = tl.load(p_lse2 + o_h * lse2_stride + t, mask=m_h, other=0.0)
    share = 1.0 / (1.0 + tl.exp2((lse2 - lse1) * 1.4426950408889634))
    o_part = t * HEADS * DIM + o_h[:, None] * DIM + o_d[None, :]
    m_part = m_h[:, None] & (o_d < DIM)[None, :]
    first = tl.load(p_first + o_part, mask=m_part, other=0.0).to(tl.float32)
    second = tl.load(p_second + o_part, mask=m_part, other=0.0).to(tl.float32)
    out = second + (first - second) * share[:, None]
    p_token = p_out + t * out_stride + o_h[:, None] * DIM + o_d[None, :]
    tl.store(p_token, out.to(p_out.dtype.element_ty), mask=m_part)


def expand(
    cache: LayerCache,
    batch: CachedBatch,
    readers: Readers,
    span: Span,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
) -> None:
    """Lay out the context of `span` as its role reads it, into `keys` and `values` [context, Hkv, D] where given."""
    kv_heads, _, dim = cache.key.shape
    given = keys if keys is not None else values
    assert given is not None
    role = max(span.role, 1) - 1
    low_v, low_k = (given if low is None else low for low in (cache.low_v, cache.low_k))
    up_v, up_k = (given if up is None else up[role] for up in (readers.up_v, readers.up_k))
    cos, sin = (given, given) if readers.rope is None else readers.rope
    rank_v, rank_k = (0 if low is None else low.shape[1] for low in (cache.low_v, cache.low_k))
    block_n = 64
    _expand_kernel[(triton.cdiv(span.context, block_n), kv_heads)](
        cache.key, cache.key.stride(0), cache.value, cache.value.stride(0), low_v, low_k,
        batch.slots[span.row], batch.low_slots[span.row], up_v, up_v.stride(0), up_k, up_k.stride(0),
        cos, sin, cos.stride(0), given if readers.key_norm is None else readers.key_norm, readers.key_eps,
        given if keys is None else keys, given if values is None else values, span.context, kv_heads,
        key_stride=cache.key.stride(1), value_stride=cache.value.stride(1),
        low_v_stride=low_v.stride(0), low_k_stride=low_k.stride(0),
        DIM=dim, D=padded(dim), HALF=padded(dim // 2), RANK_V=rank_v, RV=padded(rank_v), RANK_K=rank_k,
        RK=padded(rank_k), ADAPTED=span.role > 0, NORMALISED=readers.key_norm is not None,
        KEYS=keys is not None, VALUES=values is not None,
        PRECISION="ieee" if given.dtype is torch.float32 else "tf32", BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def expanded_attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: CachedBatch,
    readers: Readers,
    spans: tuple[Span, ...],
    scale: float,
) -> torch.Tensor:
    """Attention of every span, one after the other. query: [T, Hq, D]. Returns [T, Hq, D]; needs CUDA and cuDNN."""
    kv_heads, _, dim = cache.key.shape
    out = None if len(spans) == 1 else torch.empty(query.shape, dtype=query.dtype, device=query.device)
    room = max(own_end(span) for span in spans)
    keys, values = (query.new_empty(room, kv_heads, dim) for _ in range(2))
    laid: dict[str, Any] = {"row": None, "key_role": None, "value_role": None, "context": 0}
    for span in sorted(spans, key=lambda span: (span.row, span.role, -span.context)):
        grown = laid["row"] != span.row or laid["context"] < span.context
        new_keys = grown or (readers.up_k is not None and laid["key_role"] != span.role)
        new_values = grown or (readers.up_v is not None and laid["value_role"] != span.role)
        if new_keys or new_values:
            expand(cache, batch, readers, span, keys if new_keys else None, values if new_values else None)
            laid = {"row": span.row, "key_role": span.role, "value_role": span.role, "context": span.context}
            for new, states in ((new_keys, keys), (new_values, values)):
                if new:  # causality hides what lies behind, but NaN would pass
                    states[span.context :] = 0
        found = _attend_span(query[span.start : span.end], keys, values, span, scale)
        if out is None:
            return found
        out[span.start : span.end] = found
    assert out is not None, "there is at least one span"
    return out


def _up_to(size: int, step: int) -> int:
    return -(-size // step) * step


def before_own(span: Span) -> int:
    """Tokens of context that a span's first attention reads, all of them before its own."""
    return (span.context - (span.end - span.start)) // FAR * FAR


def own_end(span: Span) -> int:
    """Where the keys end that its second attention reads, causally: the rest of the context, filled up."""
    return before_own(span) + _up_to(span.context - before_own(span), NEAR)


def _attend_span(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span, scale: float
) -> torch.Tensor:
    """query: [n, Hq, D], the span's. Returns the same shape."""
    fresh, before, end = span.end - span.start, before_own(span), own_end(span)
    lag = span.context - fresh - before  # cached tokens in the second part: rows of its square that nobody asks for
    own = slice(before, end)
    if not before and not lag and end == fresh:
        return _cudnn(query, keys[own], values[own], True, scale)[0]
    asked = query.new_zeros(max(end - before, lag + _up_to(fresh, NEAR)), *query.shape[1:])
    asked[lag : lag + fresh] = query
    part, lse = _cudnn(asked[: end - before], keys[own], values[own], True, scale)
    part = part[lag : lag + fresh]
    if not before:
        return part
    far, far_lse = _cudnn(asked[lag : lag + _up_to(fresh, NEAR)], keys[:before], values[:before], False, scale)
    heads, dim = part.shape[1:]
    _join_kernel[(fresh,)](
        part, part.stride(0), far, part, far_lse, lse[:, lag:], far_lse.stride(0), lse.stride(0),
        HEADS=heads, H=triton.next_power_of_2(heads), DIM=dim, D=padded(dim), num_warps=4,
    )  # fmt: skip
    return part


def shapes_ahead(tokens: int, most_context: int) -> list[tuple[int, int, bool]]:
    """What cuDNN will be asked for chunks of `tokens` in contexts up to `most_context`: queries, keys, causal."""
    tokens = _up_to(tokens, NEAR)
    squares = [(tokens + lag, tokens + lag, True) for lag in range(0, FAR + 1, NEAR) if tokens + lag <= most_context]
    return squares + [(tokens, far, False) for far in range(FAR, most_context - tokens + 1, FAR)]


def plan_shape(
    shape: tuple[int, int, bool], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Let cuDNN plan for one of `shapes_ahead` before somebody waits for it."""
    queries, context, causal = shape
    query = torch.zeros(queries, heads, dim, dtype=dtype, device=device)
    keys = torch.zeros(context, kv_heads, dim, dtype=dtype, device=device)
    _cudnn(query, keys, keys, causal, 1.0)


def _cudnn(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query: [n, Hq, D]; keys, values: [L, Hkv, D]. Returns [n, Hq, D] and the scores' logsumexp [Hq, n]."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return out[0].transpose(0, 1).contiguous(), lse[0].squeeze(-1).contiguous()
