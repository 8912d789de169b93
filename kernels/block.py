"""Flash-LoRA-Attention of one block of rows over a run of tiles: the part that both attention kernels share.

A row is one query head of one new token; the rows of a block share a key head. The low-rank part has an accumulator of
its own, `P LR` of width r, and is never expanded over the context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lragent.kernels.tile import add_low, load_slots, load_tile, load_up, residual_scores, scores_to_weights


@triton.jit
def attend_tiles(
    acc, acc_low, m_i, l_i,
    q, q1, q2, positions, roles, role, tile, tile_end, context,
    p_key, p_value, p_low_v, p_low_k, p_slots, p_low_slots,
    cos_i, sin_i, b_up1, b_up2, b_norm1, b_norm2, p_cos, p_sin, rope_stride, key_eps, qk_scale, softcap, window,
    key_stride: tl.constexpr, value_stride: tl.constexpr, low_v_stride: tl.constexpr, low_k_stride: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, RANK_V: tl.constexpr, RV: tl.constexpr,
    RANK_K: tl.constexpr, RK: tl.constexpr, BLOCK_N: tl.constexpr, SAME_SLOTS: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, NORMALISED: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to tiles `tile..tile_end`. acc: [BM, D], acc_low: [BM, RV], m_i and l_i: [BM], all float32.

    q: [BM, D]; where keys depend on the reader, q1 and q2 are its halves [BM, HALF], and rows of other roles than
    `role` see nothing. Without MASKED every row must see every token of the tiles.
    """
    o_d, o_rv = tl.arange(0, D), tl.arange(0, RV)
    for t in range(tile, tile_end):
        o_n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        there = o_n < context
        slots = load_slots(p_slots, o_n, there, MASKED)  # [BN]
        low_slots = slots
        if (RANK_V > 0 or RANK_K > 0) and not SAME_SLOTS:
            low_slots = load_slots(p_low_slots, o_n, there, MASKED)
        if RANK_K > 0:
            scores = residual_scores(
                q, q1, q2, p_key, p_low_k, slots, low_slots, there, t * BLOCK_N, p_cos, p_sin, rope_stride,
                cos_i, sin_i, b_up1, b_up2, b_norm1, b_norm2, key_eps,
                key_stride, low_k_stride, DIM, D, HALF, RANK_K, RK, NORMALISED, MASKED, PRECISION,
            )  # fmt: skip
        else:
            key = load_tile(p_key, slots, there, o_d, key_stride, DIM, DIM < D, MASKED)  # [BN, D]
            scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)  # [BM, BN]
        value = load_tile(p_value, slots, there, o_d, value_stride, DIM, DIM < D, MASKED)  # [BN, D]
        if RANK_V > 0:
            low_v = load_tile(p_low_v, low_slots, there, o_rv, low_v_stride, RANK_V, RANK_V < RV, MASKED)  # [BN, RV]
        visible = there[None, :]
        if MASKED:
            visible = visible & (o_n[None, :] <= positions[:, None])
            if WINDOWED:
                visible = visible & (o_n[None, :] > positions[:, None] - window)
        if RANK_K > 0:
            visible = visible & (roles == role)[:, None]
        weights, m_i, l_i, alpha = scores_to_weights(
            scores, visible, m_i, l_i, qk_scale, softcap, SOFTCAP, MASKED or RANK_K > 0
        )
        # The narrow product stands before the wide one: with few rows the compiler divides all of a loop's products
        # over the warps as it divides the last, and this one alone it would give to each warp whole.
        if RANK_V > 0:
            acc_low = acc_low * alpha[:, None]
            acc_low = tl.dot(weights.to(low_v.dtype), low_v, acc_low, input_precision=PRECISION)
        acc = acc * alpha[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, acc_low, m_i, l_i


@triton.jit
def attend_block(
    p_query, query_stride, head_stride, p_key, p_value, p_low_v, p_low_k, p_slots, p_low_slots,
    p_up_k, role_stride, rank_stride, p_cos, p_sin, rope_stride, p_norm, key_eps,
    kv, start, fresh, context, first_row, roles, least, most, tile, tile_end,
    qk_scale, softcap, window,
    key_stride: tl.constexpr, value_stride: tl.constexpr, low_v_stride: tl.constexpr, low_k_stride: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, RANK_V: tl.constexpr,
    RV: tl.constexpr, RANK_K: tl.constexpr, RK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_SLOTS: tl.constexpr, ONE_LOOP: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    NORMALISED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The block of rows from `first_row` on, of a sequence of `fresh` new tokens, over a run of tiles.

    p_key, p_value, p_up_k are at their key head, p_slots at the sequence's row. roles: [BM] in least..most, or 0. Keys
    that depend on the reader take one pass for every role that the block has. Returns acc [BM, D], acc_low [BM, RV],
    m_i, l_i [BM], unnormalised.
    """
    o_d, o_half = tl.arange(0, D), tl.arange(0, HALF)
    o_m = first_row + tl.arange(0, BLOCK_M)
    rows = fresh * GROUP
    m_m = o_m < rows
    positions = context - fresh + o_m // GROUP  # [BM]
    token = (start + o_m // GROUP).to(tl.int64)
    head = (kv * GROUP + o_m % GROUP).to(tl.int64)  # [BM]
    p_q = p_query + (token * query_stride + head * head_stride)[:, None]
    q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & (o_d < DIM)[None, :], other=0.0)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    acc_low = tl.zeros([BLOCK_M, RV], tl.float32)

    # Tiles that every row sees whole: between the window's far edge and the first query.
    clear, clear_end = tile, tile
    if not ONE_LOOP:
        clear_end = tl.minimum((context - fresh + first_row // GROUP + 1) // BLOCK_N, tile_end)
        if WINDOWED:
            last = context - fresh + (tl.minimum(first_row + BLOCK_M, rows) - 1) // GROUP
            clear = tl.minimum(tl.maximum(tl.cdiv(last - window + 1, BLOCK_N), tile), tile_end)
        clear_end = tl.maximum(clear_end, clear)

    q1, q2, cos_i, sin_i, b_norm1, b_norm2 = q, q, q, q, q, q  # not read unless k_proj is adapted
    first_role, last_role = 0, 0
    if RANK_K > 0:
        m_half = o_half < DIM // 2
        q1 = tl.load(p_q + o_half[None, :], mask=m_m[:, None] & m_half[None, :], other=0.0).to(tl.float32)
        q2 = tl.load(p_q + DIM // 2 + o_half[None, :], mask=m_m[:, None] & m_half[None, :], other=0.0).to(tl.float32)
        o_angle = tl.arange(0, BLOCK_N)[:, None] * rope_stride + o_half[None, :]
        unscaled = 1.0 / tl.load(p_cos)  # the tables hold attention's scaling, at position 0 alone
        cos_i = tl.load(p_cos + o_angle, mask=m_half[None, :], other=0.0) * unscaled
        sin_i = tl.load(p_sin + o_angle, mask=m_half[None, :], other=0.0) * unscaled
        if NORMALISED:
            b_norm1 = tl.load(p_norm + o_half, mask=m_half, other=0.0)
            b_norm2 = tl.load(p_norm + DIM // 2 + o_half, mask=m_half, other=0.0)
        first_role, last_role = tl.min(tl.where(m_m, roles, 1 << 30), 0), most
    for role in range(first_role, last_role + 1):
        present = True
        b_up1, b_up2 = q, q
        if RANK_K > 0:
            present = tl.max(((roles == role) & m_m).to(tl.int32), 0) > 0
            b_up1 = load_up(p_up_k, role, role_stride, rank_stride, o_half, DIM // 2, RANK_K, RK)
            b_up2 = load_up(p_up_k + DIM // 2, role, role_stride, rank_stride, o_half, DIM // 2, RANK_K, RK)
        if present:
            if not ONE_LOOP:
                if WINDOWED:
                    acc, acc_low, m_i, l_i = attend_tiles(
                        acc, acc_low, m_i, l_i, q, q1, q2, positions, roles, role, tile, clear, context,
                        p_key, p_value, p_low_v, p_low_k, p_slots, p_low_slots, cos_i, sin_i, b_up1, b_up2,
                        b_norm1, b_norm2, p_cos, p_sin, rope_stride, key_eps, qk_scale, softcap, window,
                        key_stride, value_stride, low_v_stride, low_k_stride, DIM, D, HALF, RANK_V, RV, RANK_K, RK,
                        BLOCK_N, SAME_SLOTS, WINDOWED, SOFTCAP, NORMALISED, PRECISION, True,
                    )  # fmt: skip
                acc, acc_low, m_i, l_i = attend_tiles(
                    acc, acc_low, m_i, l_i, q, q1, q2, positions, roles, role, clear, clear_end, context,
                    p_key, p_value, p_low_v, p_low_k, p_slots, p_low_slots, cos_i, sin_i, b_up1, b_up2,
                    b_norm1, b_norm2, p_cos, p_sin, rope_stride, key_eps, qk_scale, softcap, window,
                    key_stride, value_stride, low_v_stride, low_k_stride, DIM, D, HALF, RANK_V, RV, RANK_K, RK,
                    BLOCK_N, SAME_SLOTS, WINDOWED, SOFTCAP, NORMALISED, PRECISION, False,
                )  # fmt: skip
            acc, acc_low, m_i, l_i = attend_tiles(
                acc, acc_low, m_i, l_i, q, q1, q2, positions, roles, role, clear_end, tile_end, context,
                p_key, p_value, p_low_v, p_low_k, p_slots, p_low_slots, cos_i, sin_i, b_up1, b_up2,
                b_norm1, b_norm2, p_cos, p_sin, rope_stride, key_eps, qk_scale, softcap, window,
                key_stride, value_stride, low_v_stride, low_k_stride, DIM, D, HALF, RANK_V, RV, RANK_K, RK,
                BLOCK_N, SAME_SLOTS, WINDOWED, SOFTCAP, NORMALISED, PRECISION, True,
            )  # fmt: skip
    return acc, acc_low, m_i, l_i


@triton.jit
def normalise_block(
    acc, acc_low, m_i, l_i, b_up, roles, least, most, p_up, role_stride, rank_stride,
    DIM: tl.constexpr, D: tl.constexpr, RANK_V: tl.constexpr, RV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Divide by the softmax's sum and apply each row's `B`. b_up: [RV, D], that of the role `least`.

    Returns the block's attention [BM, D] and the base-2 logarithm [BM] of its softmax's sum, both float32.
    """
    seen = tl.where(l_i == 0.0, 1.0, l_i)
    out = acc / seen[:, None]
    if RANK_V > 0:
        low_out = acc_low / seen[:, None]
        out = add_low(
            out, low_out, b_up, roles, least, most, p_up, role_stride, rank_stride, tl.arange(0, D),
            DIM, RANK_V, RV, PRECISION,
        )  # fmt: skip
    return out, m_i + tl.log2(seen)


@triton.jit
def store_block(
    out, p_out, out_stride, kv, start, fresh, first_row,
    GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write a block's rows. p_out: [T, Hq, DIM], heads side by side."""
    o_d = tl.arange(0, D)
    o_m = first_row + tl.arange(0, BLOCK_M)
    p_rows = p_out + (start + o_m // GROUP).to(tl.int64) * out_stride + (kv * GROUP + o_m % GROUP) * DIM
    m_out = (o_m < fresh * GROUP)[:, None] & (o_d < DIM)[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], out.to(p_out.dtype.element_ty), mask=m_out)
