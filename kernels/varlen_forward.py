"""The forward pass of `varlen.py`: a program for every tile of queries and query head (FlashAttention-2's order).

What the programs hold: BM queries, BN keys, DP and RP columns, which are D and r rounded up to powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lragent.kernels.varlen_layout import Tile, VarlenLayout
from lragent.kernels.varlen_tiles import key_ranges, load_tile, raw_scores, seen, to_log2


@triton.jit
def _attend(
    b_query, b_max, b_sum, b_out, b_low_out, p_key, p_value, p_low, stride_kt, stride_vt,
    lo, hi, o_m, length, scale,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Carry the online softmax over the keys lo..hi."""
    o_row = tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    o_r = tl.arange(0, RP)
    o_key = o_row[:, None] * stride_kt + o_d[None, :]  # [BN, DP]
    o_value = o_row[:, None] * stride_vt + o_d[None, :]
    o_low = o_row[:, None] * RP + o_r[None, :]  # [BN, RP]
    m_d = o_d[None, :] < D
    factor = to_log2(scale, CAP)
    # Offsets within a tile stay 32 bits wide; only the place of the tile needs 64.
    if lo < hi:
        for n in tl.range(lo, hi, BN):
            place = tl.cast(n, tl.int64)
            m_n = (n + o_row)[:, None] < length
            b_key = load_tile(p_key + place * stride_kt + o_key, m_n, m_d, MASKED, D != DP)
            b_scores = raw_scores(b_query, b_key, scale, CAP)  # [BM, BN]
            if MASKED:
                b_scores = tl.where(seen(o_m[:, None], (n + o_row)[None, :], WINDOW), b_scores, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_scores, 1) * factor)  # [BM]
            b_shift = b_new
            if MASKED and WINDOW is not None:  # where nothing is seen yet, all weights must come out zero
                b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_weights = tl.exp2(b_scores * factor - b_shift[:, None])
            b_decay = tl.exp2(b_max - b_shift)
            b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
            b_out = b_out * b_decay[:, None]
            b_value = load_tile(p_value + place * stride_vt + o_value, m_n, m_d, MASKED, D != DP)
            b_weights = b_weights.to(b_value.dtype)
            b_out = tl.dot(b_weights, b_value, b_out, input_precision="ieee")
            if LOW:
                b_low_out = b_low_out * b_decay[:, None]
                b_low = load_tile(p_low + place * RP + o_low, m_n, m_n, MASKED, False)
                b_low_out = tl.dot(b_weights, b_low, b_low_out, input_precision="ieee")
            b_max = b_new
    return b_max, b_sum, b_out, b_low_out


@triton.jit
def forward_kernel(
    p_query, p_key, p_value, p_low, p_out, p_low_out, p_lse, p_tiles,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, tokens, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # neighbours share a tile's keys in the second-level cache
    kv = head // GROUP
    p_tile = p_tiles + 4 * tl.program_id(1)
    first = tl.load(p_tile).to(tl.int64)
    length = tl.load(p_tile + 1)
    m0 = tl.load(p_tile + 2)

    o_m = m0 + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    m_m = o_m[:, None] < length
    m_d = o_d[None, :] < D
    p_query += head * stride_qh + first * stride_qt
    p_key += kv * stride_kh + first * stride_kt
    p_value += kv * stride_vh + first * stride_vt
    p_low += first * RP
    b_query = load_tile(p_query + o_m[:, None].to(tl.int64) * stride_qt + o_d[None, :], m_m, m_d, True, D != DP)

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, DP], tl.float32)
    b_low_out = tl.zeros([BM, RP], tl.float32)
    lo, a, b, hi = key_ranges(m0, length, BM, BN, WINDOW)
    if WINDOW is not None:
        b_max, b_sum, b_out, b_low_out = _attend(
            b_query, b_max, b_sum, b_out, b_low_out, p_key, p_value, p_low, stride_kt, stride_vt,
            lo, a, o_m, length, scale, D, DP, RP, BN, LOW, WINDOW, CAP, True,
        )  # fmt: skip
    b_max, b_sum, b_out, b_low_out = _attend(
        b_query, b_max, b_sum, b_out, b_low_out, p_key, p_value, p_low, stride_kt, stride_vt,
        a, b, o_m, length, scale, D, DP, RP, BN, LOW, WINDOW, CAP, False,
    )  # fmt: skip
    b_max, b_sum, b_out, b_low_out = _attend(
        b_query, b_max, b_sum, b_out, b_low_out, p_key, p_value, p_low, stride_kt, stride_vt,
        b, hi, o_m, length, scale, D, DP, RP, BN, LOW, WINDOW, CAP, True,
    )  # fmt: skip

    o_out = ((first + o_m) * heads + head)[:, None]  # the row in [T * Hq]
    b_out = b_out / b_sum[:, None]
    tl.store(p_out + o_out * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_m & m_d)
    if LOW:
        o_r = tl.arange(0, RP)
        b_low_out = (b_low_out / b_sum[:, None]).to(p_low_out.dtype.element_ty)
        tl.store(p_low_out + o_out * R + o_r[None, :], b_low_out, mask=m_m & (o_r[None, :] < R))
    tl.store(p_lse + head * tokens + first + o_m, b_max + tl.log2(b_sum), mask=o_m < length)


def run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    rank: int,
    layout: VarlenLayout,
    tile: Tile,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Checked arguments to `out` [T, Hq, D], `low_out` [T, Hq, rank] and the log-sum-exp [Hq, T], float32, base two.

    low: [T, RP] contiguous, in the dtype of the values, its columns filled up with zeros to a power of two.
    """
    heads, tokens, dim = query.shape
    out = query.new_empty(tokens, heads, dim)
    low_out = None if low is None else query.new_empty(tokens, heads, rank)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    tiles = layout.query_tiles(tile.queries)
    forward_kernel[(heads, len(tiles))](
        query, key, value, value if low is None else low, out, out if low_out is None else low_out, lse, tiles,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        tokens, heads, scale,
        GROUP=heads // key.shape[0], D=dim, DP=triton.next_power_of_2(dim), R=rank,
        RP=16 if low is None else low.shape[1], BM=tile.queries, BN=tile.keys,
        LOW=low is not None, WINDOW=window, CAP=softcap, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, low_out, lse
