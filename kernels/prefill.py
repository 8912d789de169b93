"""Flash-LoRA-Attention for long chunks of new tokens over a cached prefix: one program per block of rows and key head.

Programs that run at the same time share a key head, whose keys and values stay in the L2 cache; the longest blocks
begin first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lragent.kernels.block import attend_block, normalise_block, store_block
from lragent.kernels.plan import BLOCK_FIELDS, Plan, load_block
from lragent.kernels.tile import load_up


@triton.jit
def _prefill_kernel(
    p_query, query_stride, head_stride, p_out, out_stride,
    p_key, key_head_stride, p_value, value_head_stride, p_low_v, p_low_k,
    p_slots, p_low_slots, table_stride, low_table_stride, p_roles,
    p_up_v, up_v_role, up_v_rank, p_up_k, up_k_role, up_k_rank, p_cos, p_sin, rope_stride, p_norm, key_eps,
    p_blocks, p_totals, kv_heads, most_blocks, qk_scale, softcap, window,
    key_stride: tl.constexpr, value_stride: tl.constexpr, low_v_stride: tl.constexpr, low_k_stride: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, RANK_V: tl.constexpr,
    RV: tl.constexpr, RANK_K: tl.constexpr, RK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_SLOTS: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, NORMALISED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_FIELDS: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(0) // most_blocks
    index = tl.load(p_totals + 1) - 1 - tl.program_id(0) % most_blocks
    if index < 0:
        return
    start, fresh, context, row, first_row, low_tile, high_tile, _, least, most = load_block(
        p_blocks + index * BLOCK_FIELDS
    )
    o_m = first_row + tl.arange(0, BLOCK_M)
    roles = tl.load(p_roles + start + o_m // GROUP, mask=o_m < fresh * GROUP, other=0)  # [BM]
    acc, acc_low, m_i, l_i = attend_block(
        p_query, query_stride, head_stride,
        p_key + kv.to(tl.int64) * key_head_stride, p_value + kv.to(tl.int64) * value_head_stride,
        p_low_v, p_low_k, p_slots + row.to(tl.int64) * table_stride, p_low_slots + row.to(tl.int64) * low_table_stride,
        p_up_k + kv * DIM, up_k_role, up_k_rank, p_cos, p_sin, rope_stride, p_norm, key_eps,
        kv, start, fresh, context, first_row, roles, least, most, low_tile, high_tile, qk_scale, softcap, window,
        key_stride, value_stride, low_v_stride, low_k_stride, GROUP, DIM, D, HALF, RANK_V, RV, RANK_K, RK,
        BLOCK_M, BLOCK_N, SAME_SLOTS, False, WINDOWED, SOFTCAP, NORMALISED, PRECISION,
    )  # fmt: skip
    p_up = p_up_v + kv * DIM
    b_up = o_m  # not read without an LR cache
    if RANK_V > 0:
        b_up = load_up(p_up, least, up_v_role, up_v_rank, tl.arange(0, D), DIM, RANK_V, RV)
    out, _ = normalise_block(
        acc, acc_low, m_i, l_i, b_up, roles, least, most, p_up, up_v_role, up_v_rank, DIM, D, RANK_V, RV, PRECISION
    )
    store_block(out, p_out, out_stride, kv, start, fresh, first_row, GROUP, DIM, D, BLOCK_M)


def launch_prefill(arguments: dict[str, Any], plan: Plan, out: torch.Tensor) -> None:
    """One launch of the prefill kernel. arguments: as from `kernels.launch.kernel_arguments`."""
    most_blocks = len(plan.blocks)
    _prefill_kernel[(most_blocks * arguments["kv_heads"],)](
        p_out=out,
        out_stride=out.stride(0),
        p_blocks=plan.blocks,
        p_totals=plan.totals,
        most_blocks=most_blocks,
        BLOCK_M=plan.sizes.block_m,
        BLOCK_N=plan.sizes.block_n,
        BLOCK_FIELDS=BLOCK_FIELDS,
        num_warps=plan.sizes.warps,
        num_stages=plan.sizes.stages,
        **arguments,
    )
