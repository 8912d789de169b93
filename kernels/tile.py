"""One tile of Flash-LoRA-Attention: what both attention kernels do with BLOCK_N tokens of context.

Scores are kept in base-2 logarithms: `qk_scale` is the scale times log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_slots(p_table, o_n, there, MASKED: tl.constexpr):
    """Where the tokens `o_n` [BN] lie."""
    if MASKED:
        return tl.load(p_table + o_n, mask=there, other=0)
    else:
        return tl.load(p_table + o_n)


@triton.jit
def load_tile(
    p_pool, slots, there, o_d, stride: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of a pool [slots, DIM] at `slots` [BN]: [BN, len(o_d)]. Zero where MASKED and not `there`, and past DIM."""
    p_rows = p_pool + slots.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASKED:
        if PADDED:
            return tl.load(p_rows, mask=there[:, None] & (o_d < DIM)[None, :], other=0.0)
        else:
            return tl.load(p_rows, mask=there[:, None], other=0.0)
    elif PADDED:
        return tl.load(p_rows, mask=(o_d < DIM)[None, :], other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def scores_to_weights(scores, visible, m_i, l_i, qk_scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """One step of online softmax. scores: [BM, BN] raw products. Returns weights, and new maximum, sum and
    rescaling."""
    if SOFTCAP:
        # tanh by exp2 of a negative number, which cannot overflow
        x = scores * (qk_scale / softcap)  # in units of log2(e)
        e = tl.exp2(tl.abs(x) * -2.0)
        t = (1.0 - e) / (1.0 + e)
        scores = tl.where(x < 0, -t, t) * (softcap * 1.4426950408889634)
        qk_scale = 1.0
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * qk_scale)
    m_safe = m_new
    if MASKED:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(scores * qk_scale - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return weights, m_new, l_i * alpha + tl.sum(weights, 1), alpha


@triton.jit
def residual_scores(
    q, q1, q2, p_key, p_low_k, slots, low_slots, there, first, p_cos, p_sin, rope_stride, cos_i, sin_i,
    b_up1, b_up2, b_norm1, b_norm2, key_eps,
    key_stride: tl.constexpr, low_k_stride: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    RANK_K: tl.constexpr, RK: tl.constexpr, NORMALISED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] against keys that depend on the reader, `K_base + RoPE(LR_k B)`, rebuilt on chip.

    A rotation to position n is one to the tile's first position and then one by the offset in the tile. The first is
    undone on the query, two vectors for the whole tile; the second has the same angles in every tile: cos_i, sin_i
    [BN, HALF] stay in registers, and no table of angles is read for the keys.
    q: [BM, D]; q1, q2: its halves [BM, HALF]; first: the tile's first position; b_up1, b_up2: halves [RK, HALF] of `B`.
    """
    half: tl.constexpr = DIM // 2
    o_half, o_rk = tl.arange(0, HALF), tl.arange(0, RK)
    cos_0 = tl.load(p_cos + first * rope_stride + o_half, mask=o_half < half, other=0.0)
    sin_0 = tl.load(p_sin + first * rope_stride + o_half, mask=o_half < half, other=0.0)
    low_k = load_tile(p_low_k, low_slots, there, o_rk, low_k_stride, RANK_K, RANK_K < RK, MASKED)  # [BN, RK]
    turned1 = (q1 * cos_0[None, :] + q2 * sin_0[None, :]).to(q.dtype)
    turned2 = (q2 * cos_0[None, :] - q1 * sin_0[None, :]).to(q.dtype)
    full1 = tl.dot(low_k, b_up1, input_precision=PRECISION)  # [BN, HALF]
    full2 = tl.dot(low_k, b_up2, input_precision=PRECISION)
    if NORMALISED:
        p_halves = p_key + slots.to(tl.int64)[:, None] * key_stride + o_half[None, :]
        if MASKED or half < HALF:
            inside = there[:, None] & (o_half < half)[None, :]
            full1 += tl.load(p_halves, mask=inside, other=0.0)
            full2 += tl.load(p_halves + half, mask=inside, other=0.0)
        else:
            full1 += tl.load(p_halves)
            full2 += tl.load(p_halves + half)
        power = (tl.sum(full1 * full1, 1) + tl.sum(full2 * full2, 1)) / DIM
        size = tl.rsqrt(power + key_eps)[:, None]
        full1 = full1 * size * b_norm1[None, :]
        full2 = full2 * size * b_norm2[None, :]
    key1 = (full1 * cos_i - full2 * sin_i).to(q.dtype)
    key2 = (full2 * cos_i + full1 * sin_i).to(q.dtype)
    scores = tl.dot(turned1, tl.trans(key1), input_precision=PRECISION)
    scores = tl.dot(turned2, tl.trans(key2), scores, input_precision=PRECISION)
    if not NORMALISED:
        key = load_tile(p_key, slots, there, tl.arange(0, D), key_stride, DIM, DIM < D, MASKED)  # [BN, D]
        scores = tl.dot(q, tl.trans(key), scores, input_precision=PRECISION)
    return scores


@triton.jit
def load_up(p_up, role, role_stride, rank_stride, o_d, DIM: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """A role's `B` at one key head: [R, len(o_d)]; zero for the base."""
    o_r = tl.arange(0, R)
    m_up = (o_r < RANK)[:, None] & (o_d < DIM)[None, :] & (role > 0)
    return tl.load(p_up + (role - 1) * role_stride + o_r[:, None] * rank_stride + o_d[None, :], mask=m_up, other=0.0)


@triton.jit
def add_low(out, low_out, b_up, roles, least, most, p_up, role_stride, rank_stride, o_d,
            DIM: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`out + low_out B`, each row by its own role's `B`: one product for every role that the rows have.

    out: [BM, D]; low_out: [BM, R]; b_up: [R, D], `B` of the role `least`, loaded before; roles: [BM] in least..most, or
    0 = base.
    """
    own = tl.where((roles == least)[:, None], low_out, 0.0).to(b_up.dtype)
    out = tl.dot(own, b_up, out, input_precision=PRECISION)
    for role in range(least + 1, most + 1):
        m_rows = roles == role
        if tl.max(m_rows.to(tl.int32), 0) > 0:
            b_other = load_up(p_up, role, role_stride, rank_stride, o_d, DIM, RANK, R)
            own = tl.where(m_rows[:, None], low_out, 0.0).to(b_other.dtype)
            out = tl.dot(own, b_other, out, input_precision=PRECISION)
    return out
