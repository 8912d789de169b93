"""The backward pass of `varlen.py`: three kernels, none of which adds to what another program writes.

With the weights P, `dS = P (dO V^T + dLow LR^T - delta)` where `delta = sum(dO O) + sum(dLow Low)` of each query; then
`dQ = dS K` over tiles of queries, and `dK = dS^T Q`, `dV = P^T dO`, `dLR = P^T dLow` over tiles of keys, for all query
heads of a KV head. The scores are computed in both: adding dQ up across programs would save that, at the price of
results that differ from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lragent.kernels.varlen_layout import ALIGNED, Blocks, VarlenLayout
from lragent.kernels.varlen_tiles import key_ranges, load_tile, raw_scores, seen, to_log2

PREPARED = 32
"""Queries that a program of `prepare_kernel` takes."""


@triton.jit
def prepare_kernel(
    p_out, p_grad, p_low_out, p_low_grad, p_lse, p_low_filled, p_lse_filled, p_delta, p_tiles,
    stride_gt, stride_gh, stride_lt, stride_lh, tokens, filled_tokens, heads,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """What the others need of every query, at its place among F filled-up tokens, where they load it without a mask:
    delta and the log-sum-exp [Hq, F], and the gradient of low_out [Hq, F, RP]. What fills up has no weight anywhere.
    """
    head = tl.program_id(0).to(tl.int64)
    p_tile = p_tiles + 4 * tl.program_id(1)
    first = tl.load(p_tile)
    length = tl.load(p_tile + 1)
    m0 = tl.load(p_tile + 2) + BM * tl.program_id(2)
    o_m = m0 + tl.arange(0, BM)
    o_token = (first + o_m).to(tl.int64)
    o_place = head * filled_tokens + tl.load(p_tile + 3) + o_m
    o_row = (o_token * heads + head)[:, None]  # in [T * Hq]
    m_m = o_m < length
    o_d = tl.arange(0, DP)[None, :]
    m_out = m_m[:, None] & (o_d < D)
    b_out = tl.load(p_out + o_row * D + o_d, mask=m_out, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad + o_token[:, None] * stride_gt + head * stride_gh + o_d, mask=m_out, other=0.0)
    b_delta = tl.sum(b_out * b_grad.to(tl.float32), 1)
    if LOW:
        o_r = tl.arange(0, RP)[None, :]
        m_low = m_m[:, None] & (o_r < R)
        b_low_out = tl.load(p_low_out + o_row * R + o_r, mask=m_low, other=0.0).to(tl.float32)
        o_low = o_token[:, None] * stride_lt + head * stride_lh + o_r
        b_low_grad = tl.load(p_low_grad + o_low, mask=m_low, other=0.0)
        b_delta += tl.sum(b_low_out * b_low_grad.to(tl.float32), 1)
        tl.store(p_low_filled + o_place[:, None] * RP + o_r, b_low_grad)
    tl.store(p_delta + o_place, b_delta)
    b_lse = tl.load(p_lse + head * tokens + o_token, mask=m_m, other=float("inf"))
    tl.store(p_lse_filled + o_place, b_lse)


@triton.jit
def _gather_queries(
    b_key, b_value, b_low, b_dkey, b_dvalue, b_dlow, p_query, p_grad, p_low_grad, p_lse, p_delta,
    stride_qh, stride_qt, stride_gh, stride_gt, filled_tokens, lo, hi, o_n, length, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, LOW: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries lo..hi of every head in the group say about a tile of keys."""
    o_row = tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    o_r = tl.arange(0, RP)
    o_query = o_row[:, None] * stride_qt + o_d[None, :]  # [BM, DP]
    o_grad = o_row[:, None] * stride_gt + o_d[None, :]
    o_low = o_row[:, None] * RP + o_r[None, :]  # [BM, RP]
    m_d = o_d[None, :] < D
    factor = to_log2(scale, CAP)
    steps = tl.maximum(0, hi - lo + BM - 1) // BM
    # One loop over heads and tiles, so that its loads stay ahead of it from one head to the next.
    head = tl.cast(0, tl.int64)
    m = lo
    for _ in tl.range(0, GROUP * steps):
        place = tl.cast(m, tl.int64)
        row = tl.multiple_of(head * filled_tokens + place, 16)
        m_m = m + o_row < length
        b_query = load_tile(p_query + head * stride_qh + place * stride_qt + o_query, m_m[:, None], m_d, True, D != DP)
        b_grad = load_tile(p_grad + head * stride_gh + place * stride_gt + o_grad, m_m[:, None], m_d, True, D != DP)
        b_scores = raw_scores(b_key, b_query, scale, CAP)  # [BN, BM]
        b_lse = tl.load(p_lse + row + o_row)
        b_weights = tl.exp2(b_scores * factor - b_lse[None, :])
        if MASKED:
            b_weights = tl.where(seen((m + o_row)[None, :], o_n[:, None], WINDOW), b_weights, 0.0)
        b_rounded = b_weights.to(b_grad.dtype)
        b_dvalue = tl.dot(b_rounded, b_grad, b_dvalue, input_precision="ieee")
        b_dweights = tl.dot(b_value, tl.trans(b_grad), input_precision="ieee")  # [BN, BM]
        if LOW:
            b_low_grad = tl.load(p_low_grad + row * RP + o_low)
            b_dlow = tl.dot(b_rounded, b_low_grad, b_dlow, input_precision="ieee")
            b_dweights = tl.dot(b_low, tl.trans(b_low_grad), b_dweights, input_precision="ieee")
        b_delta = tl.load(p_delta + row + o_row)
        b_dscores = b_weights * (b_dweights - b_delta[None, :])
        if CAP is not None:
            b_dscores = b_dscores * (1 - b_scores * b_scores)
        b_dkey = tl.dot(b_dscores.to(b_query.dtype), b_query, b_dkey, input_precision="ieee")
        head += (m + BM >= hi).to(tl.int64)
        m = tl.where(m + BM >= hi, lo, m + BM)
    return b_dkey, b_dvalue, b_dlow


@triton.jit
def grad_keys_kernel(
    p_query, p_key, p_value, p_low, p_grad, p_low_grad, p_lse, p_delta, p_dkey, p_dvalue, p_dlow, p_tiles,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, stride_gh, stride_gt,
    stride_dkh, stride_dkt, stride_dvh, stride_dvt, tokens, filled_tokens, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(0).to(tl.int64)
    p_tile = p_tiles + 4 * tl.program_id(1)
    first = tl.load(p_tile).to(tl.int64)
    length = tl.load(p_tile + 1)
    n0 = tl.load(p_tile + 2)

    o_n = n0 + tl.arange(0, BN)
    o_token = (first + o_n)[:, None]  # [BN, 1]
    o_d = tl.arange(0, DP)[None, :]
    o_r = tl.arange(0, RP)[None, :]
    m_n = o_n[:, None] < length
    m_d = o_d < D
    b_key = load_tile(p_key + kv * stride_kh + o_token * stride_kt + o_d, m_n, m_d, True, D != DP)
    b_value = load_tile(p_value + kv * stride_vh + o_token * stride_vt + o_d, m_n, m_d, True, D != DP)
    b_low = load_tile(p_low + o_token * RP + o_r, m_n, m_d, True, False) if LOW else None
    p_query += kv * GROUP * stride_qh + first * stride_qt
    p_grad += kv * GROUP * stride_gh + first * stride_gt
    filled = tl.multiple_of(kv * GROUP * filled_tokens + tl.load(p_tile + 3), 128)
    p_low_grad += filled * RP
    p_lse += filled
    p_delta += filled

    b_dkey = tl.zeros([BN, DP], tl.float32)
    b_dvalue = tl.zeros([BN, DP], tl.float32)
    b_dlow = tl.zeros([BN, RP], tl.float32)
    # Queries from n0 to a do not see every key of the tile, from a to b all do, from b to hi some no longer do.
    hi = length
    if WINDOW is not None:
        hi = tl.minimum(length, n0 + BN - 1 + WINDOW)
    a = tl.minimum(hi, n0 + (BN + BM - 1) // BM * BM)
    b = hi
    if WINDOW is not None:
        b = tl.minimum(hi, a + tl.maximum(0, n0 + WINDOW - a) // BM * BM)
    b_dkey, b_dvalue, b_dlow = _gather_queries(
        b_key, b_value, b_low, b_dkey, b_dvalue, b_dlow, p_query, p_grad, p_low_grad, p_lse, p_delta,
        stride_qh, stride_qt, stride_gh, stride_gt, filled_tokens, n0, a, o_n, length, scale,
        GROUP, D, DP, RP, BM, LOW, WINDOW, CAP, True,
    )  # fmt: skip
    b_dkey, b_dvalue, b_dlow = _gather_queries(
        b_key, b_value, b_low, b_dkey, b_dvalue, b_dlow, p_query, p_grad, p_low_grad, p_lse, p_delta,
        stride_qh, stride_qt, stride_gh, stride_gt, filled_tokens, a, b, o_n, length, scale,
        GROUP, D, DP, RP, BM, LOW, WINDOW, CAP, False,
    )  # fmt: skip
    if WINDOW is not None:
        b_dkey, b_dvalue, b_dlow = _gather_queries(
            b_key, b_value, b_low, b_dkey, b_dvalue, b_dlow, p_query, p_grad, p_low_grad, p_lse, p_delta,
            stride_qh, stride_qt, stride_gh, stride_gt, filled_tokens, b, hi, o_n, length, scale,
            GROUP, D, DP, RP, BM, LOW, WINDOW, CAP, True,
        )  # fmt: skip

    b_dkey = (b_dkey * scale).to(p_dkey.dtype.element_ty)
    tl.store(p_dkey + kv * stride_dkh + o_token * stride_dkt + o_d, b_dkey, mask=m_n & m_d)
    b_dvalue = b_dvalue.to(p_dvalue.dtype.element_ty)
    tl.store(p_dvalue + kv * stride_dvh + o_token * stride_dvt + o_d, b_dvalue, mask=m_n & m_d)
    if LOW:
        tl.store(p_dlow + (kv * tokens + o_token) * RP + o_r, b_dlow, mask=m_n)


@triton.jit
def _gather_keys(
    b_query, b_grad, b_low_grad, b_lse, b_delta, b_dquery, p_key, p_value, p_low, stride_kt, stride_vt,
    lo, hi, o_m, length, scale,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys lo..hi say about a tile of queries."""
    o_row = tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    o_r = tl.arange(0, RP)
    o_key = o_row[:, None] * stride_kt + o_d[None, :]  # [BN, DP]
    o_value = o_row[:, None] * stride_vt + o_d[None, :]
    o_low = o_row[:, None] * RP + o_r[None, :]  # [BN, RP]
    m_d = o_d[None, :] < D
    factor = to_log2(scale, CAP)
    if lo < hi:
        for n in tl.range(lo, hi, BN):
            place = tl.cast(n, tl.int64)
            m_n = (n + o_row)[:, None] < length
            b_key = load_tile(p_key + place * stride_kt + o_key, m_n, m_d, MASKED, D != DP)
            b_value = load_tile(p_value + place * stride_vt + o_value, m_n, m_d, MASKED, D != DP)
            b_scores = raw_scores(b_query, b_key, scale, CAP)  # [BM, BN]
            b_dweights = tl.dot(b_grad, tl.trans(b_value), input_precision="ieee")  # [BM, BN]
            if LOW:
                b_low = load_tile(p_low + place * RP + o_low, m_n, m_d, MASKED, False)
                b_dweights = tl.dot(b_low_grad, tl.trans(b_low), b_dweights, input_precision="ieee")
            b_weights = tl.exp2(b_scores * factor - b_lse[:, None])
            if MASKED:
                b_weights = tl.where(seen(o_m[:, None], (n + o_row)[None, :], WINDOW), b_weights, 0.0)
            b_dscores = b_weights * (b_dweights - b_delta[:, None])
            if CAP is not None:
                b_dscores = b_dscores * (1 - b_scores * b_scores)
            b_dquery = tl.dot(b_dscores.to(b_key.dtype), b_key, b_dquery, input_precision="ieee")
    return b_dquery


@triton.jit
def grad_queries_kernel(
    p_query, p_key, p_value, p_low, p_grad, p_low_grad, p_lse, p_delta, p_dquery, p_tiles,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, stride_gh, stride_gt, stride_dqh, stride_dqt,
    filled_tokens, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    kv = head // GROUP
    p_tile = p_tiles + 4 * tl.program_id(1)
    first = tl.load(p_tile).to(tl.int64)
    length = tl.load(p_tile + 1)
    m0 = tl.load(p_tile + 2)

    o_m = m0 + tl.arange(0, BM)
    o_token = (first + o_m)[:, None]  # [BM, 1]
    o_d = tl.arange(0, DP)[None, :]
    o_r = tl.arange(0, RP)[None, :]
    m_m = o_m[:, None] < length
    m_d = o_d < D
    b_query = load_tile(p_query + head * stride_qh + o_token * stride_qt + o_d, m_m, m_d, True, D != DP)
    b_grad = load_tile(p_grad + head * stride_gh + o_token * stride_gt + o_d, m_m, m_d, True, D != DP)
    o_filled = head * filled_tokens + tl.load(p_tile + 3) + o_m
    b_low_grad = tl.load(p_low_grad + o_filled[:, None] * RP + o_r) if LOW else None
    b_lse = tl.load(p_lse + o_filled)
    b_delta = tl.load(p_delta + o_filled)
    p_key += kv * stride_kh + first * stride_kt
    p_value += kv * stride_vh + first * stride_vt
    p_low += first * RP

    b_dquery = tl.zeros([BM, DP], tl.float32)
    lo, a, b, hi = key_ranges(m0, length, BM, BN, WINDOW)
    if WINDOW is not None:
        b_dquery = _gather_keys(
            b_query, b_grad, b_low_grad, b_lse, b_delta, b_dquery, p_key, p_value, p_low, stride_kt, stride_vt,
            lo, a, o_m, length, scale, D, DP, RP, BN, LOW, WINDOW, CAP, True,
        )  # fmt: skip
    b_dquery = _gather_keys(
        b_query, b_grad, b_low_grad, b_lse, b_delta, b_dquery, p_key, p_value, p_low, stride_kt, stride_vt,
        a, b, o_m, length, scale, D, DP, RP, BN, LOW, WINDOW, CAP, False,
    )  # fmt: skip
    b_dquery = _gather_keys(
        b_query, b_grad, b_low_grad, b_lse, b_delta, b_dquery, p_key, p_value, p_low, stride_kt, stride_vt,
        b, hi, o_m, length, scale, D, DP, RP, BN, LOW, WINDOW, CAP, True,
    )  # fmt: skip
    b_dquery = (b_dquery * scale).to(p_dquery.dtype.element_ty)
    tl.store(p_dquery + head * stride_dqh + o_token * stride_dqt + o_d, b_dquery, mask=m_m & m_d)


def run_backward(
    grad: torch.Tensor,
    low_grad: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    out: torch.Tensor,
    low_out: torch.Tensor | None,
    lse: torch.Tensor,
    layout: VarlenLayout,
    blocks: Blocks,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of query, key and value, as these are laid out, and of low [T, RP] in float32.

    grad: [T, Hq, D]; low_grad: [T, Hq, r]; the rest as in `run_forward` and as it returned them.
    """
    heads, tokens, dim = query.shape
    kv_heads = key.shape[0]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    low_grad = low_grad if low_grad is None or low_grad.stride(-1) == 1 else low_grad.contiguous()
    filled_tokens = layout.filled_tokens
    delta, lse_filled = lse.new_empty(2, heads, filled_tokens)
    low_filled = None if low is None else query.new_empty(heads, filled_tokens, low.shape[1])
    dims = {"D": dim, "DP": triton.next_power_of_2(dim), "RP": 16 if low is None else low.shape[1]}
    dims["LOW"] = low is not None
    tiles = layout.query_tiles(ALIGNED)
    prepare_kernel[(heads, len(tiles), ALIGNED // PREPARED)](
        out, grad, *_or(out, low_out, low_grad), lse, *_or(out, low_filled), lse_filled, delta, tiles,
        grad.stride(0), grad.stride(1), *((0, 0) if low_grad is None else low_grad.stride()[:2]),
        tokens, filled_tokens, heads, R=0 if low_out is None else low_out.shape[2], BM=PREPARED, **dims,
    )  # fmt: skip

    dims |= {"GROUP": heads // kv_heads, "WINDOW": window, "CAP": softcap}
    read = (query, key, value, *_or(value, low), grad, *_or(grad, low_filled), lse_filled, delta)
    strides = tuple(step for x in (query, key, value) for step in x.stride()[:2])
    strides += (grad.stride(1), grad.stride(0))
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    dlow = None if low is None else lse.new_empty(kv_heads, tokens, low.shape[1])
    tile = blocks.grad_keys
    tiles = layout.key_tiles(tile.keys)
    grad_keys_kernel[(kv_heads, len(tiles))](
        *read, dkey, dvalue, *_or(lse, dlow), tiles, *strides, *dkey.stride()[:2], *dvalue.stride()[:2],
        tokens, filled_tokens, scale,
        BM=tile.queries, BN=tile.keys, num_warps=tile.warps, num_stages=tile.stages, **dims,
    )  # fmt: skip
    tile = blocks.grad_queries
    tiles = layout.query_tiles(tile.queries)
    grad_queries_kernel[(heads, len(tiles))](
        *read, dquery, tiles, *strides, *dquery.stride()[:2], filled_tokens, scale,
        BM=tile.queries, BN=tile.keys, num_warps=tile.warps, num_stages=tile.stages, **dims,
    )  # fmt: skip
    return dquery, dkey, dvalue, None if dlow is None else dlow.sum(0)


def _or(stand_in: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Pointers that a kernel compiled without them never follows."""
    return [stand_in if x is None else x for x in tensors]
