"""Flash-LoRA-Attention for few new tokens: decode and short appends, split over the context so that the GPU is full.

See `kernels.plan` for how the work is divided. A program walks through its run of units; a block that lies wholly in
its run is written at once. Of a block that several programs share each leaves its part in scratch, and a second launch
adds the parts up. The readers' `B` is applied by each program to its own part, once per row, so that nothing but
attention itself has to be added up.

Both in one launch, the last program to arrive adding up, was tried and is slower: one program alone reads all parts,
and what it needs to read many at once costs every program registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lragent.kernels.block import attend_block, normalise_block, store_block
from lragent.kernels.launch import starts_early
from lragent.kernels.plan import BLOCK_FIELDS, RUN_FIELDS, Plan, load_block, run_of, run_start
from lragent.kernels.tile import load_up

MERGED = 8
"""Parts that the reduction reads at once: one waits as long as all together."""


@triton.jit
def _split_kernel(
    p_query, query_stride, head_stride, p_out, out_stride,
    p_key, key_head_stride, p_value, value_head_stride, p_low_v, p_low_k,
    p_slots, p_low_slots, table_stride, low_table_stride, p_roles,
    p_up_v, up_v_role, up_v_rank, p_up_k, up_k_role, up_k_rank, p_cos, p_sin, rope_stride, p_norm, key_eps,
    p_blocks, p_runs, p_totals, p_part_out, p_part_lse,
    kv_heads, programs, qk_scale, softcap, window,
    key_stride: tl.constexpr, value_stride: tl.constexpr, low_v_stride: tl.constexpr, low_k_stride: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, RANK_V: tl.constexpr,
    RV: tl.constexpr, RANK_K: tl.constexpr, RK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_SLOTS: tl.constexpr, ONE_LOOP: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    NORMALISED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_FIELDS: tl.constexpr,
    RUN_FIELDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    p_run = p_runs + program * RUN_FIELDS
    left = tl.load(p_run)
    index = tl.load(p_run + 1)
    kv = tl.load(p_run + 2)
    tile = tl.load(p_run + 3)
    start, fresh, context, row, first_row, low_tile, high_tile, _, least, most = load_block(p_run + 4)
    o_d, o_b = tl.arange(0, D), tl.arange(0, BLOCK_M)
    part = 2 * program  # the first block's part, then the last one's
    while left > 0:
        tiles = high_tile - low_tile
        o_m = first_row + o_b
        m_m = o_m < fresh * GROUP
        roles = tl.load(p_roles + start + o_m // GROUP, mask=m_m, other=0)  # [BM]
        count = tl.minimum(high_tile - tile, left)
        p_up = p_up_v + kv * DIM
        b_up = o_d  # not read without an LR cache
        if RANK_V > 0:
            b_up = load_up(p_up, least, up_v_role, up_v_rank, o_d, DIM, RANK_V, RV)
        acc, acc_low, m_i, l_i = attend_block(
            p_query, query_stride, head_stride,
            p_key + kv.to(tl.int64) * key_head_stride, p_value + kv.to(tl.int64) * value_head_stride,
            p_low_v, p_low_k,
            p_slots + row.to(tl.int64) * table_stride, p_low_slots + row.to(tl.int64) * low_table_stride,
            p_up_k + kv * DIM, up_k_role, up_k_rank, p_cos, p_sin, rope_stride, p_norm, key_eps,
            kv, start, fresh, context, first_row, roles, least, most, tile, tile + count, qk_scale, softcap, window,
            key_stride, value_stride, low_v_stride, low_k_stride, GROUP, DIM, D, HALF, RANK_V, RV, RANK_K, RK,
            BLOCK_M, BLOCK_N, SAME_SLOTS, ONE_LOOP, WINDOWED, SOFTCAP, NORMALISED, PRECISION,
        )  # fmt: skip
        out, lse = normalise_block(
            acc, acc_low, m_i, l_i, b_up, roles, least, most, p_up, up_v_role, up_v_rank, DIM, D, RANK_V, RV, PRECISION
        )
        if count == tiles:
            store_block(out, p_out, out_stride, kv, start, fresh, first_row, GROUP, DIM, D, BLOCK_M)
        else:
            tl.store(
                p_part_out + (part * BLOCK_M + o_b)[:, None] * D + o_d[None, :],
                out.to(p_part_out.dtype.element_ty),
                mask=m_m[:, None],
            )
            tl.store(p_part_lse + part * BLOCK_M + o_b, lse)
        left -= count
        part = 2 * program + 1
        tile = low_tile
        kv += 1
        if (kv == kv_heads) & (left > 0):  # on to the next block; before that, to the same block's next key head
            kv = kv * 0
            index += 1
            start, fresh, context, row, first_row, low_tile, high_tile, _before, least, most = load_block(
                p_blocks + index * BLOCK_FIELDS
            )
            tile = low_tile


@triton.jit
def _add_up_kernel(
    p_out, out_stride, p_blocks, p_totals, p_part_out, p_part_lse, kv_heads, programs,
    GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, MERGED: tl.constexpr,
    BLOCK_FIELDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of one block and key head, where several programs had a part of it."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index, kv, row = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    start, fresh, _, _, first_row, low_tile, high_tile, before, _, _ = load_block(p_blocks + index * BLOCK_FIELDS)
    units = tl.load(p_totals) * kv_heads
    if (index >= tl.load(p_totals + 1)) | (first_row + row >= fresh * GROUP):
        return
    tiles = high_tile - low_tile
    first_unit = before * kv_heads + kv * tiles
    first = run_of(first_unit, units, programs)
    last = run_of(first_unit + tiles - 1, units, programs)
    if first == last:
        return  # the one program has written it
    # Only the first of them may have begun with an earlier block, which took its first place.
    late = (run_start(first, units, programs) < first_unit).to(tl.int32)
    whole = _load_part(p_part_out, p_part_lse, 2 * first + late, row, True, D, BLOCK_M)
    for other in range(first + 1, last + 1, MERGED):
        whole = _merge(whole, _load_parts(p_part_out, p_part_lse, other, last, row, D, BLOCK_M, MERGED))
    token, head = start + (first_row + row) // GROUP, kv * GROUP + (first_row + row) % GROUP
    o_d = tl.arange(0, D)
    p_row = p_out + token.to(tl.int64) * out_stride + head * DIM
    tl.store(p_row + o_d, (whole[0] / whole[2]).to(p_out.dtype.element_ty), mask=o_d < DIM)


@triton.jit
def _load_parts(p_part_out, p_part_lse, other, last, row, D: tl.constexpr, BLOCK_M: tl.constexpr, COUNT: tl.constexpr):
    """The first parts of programs `other .. other + COUNT`, up to `last`, as one; all are read before any is added."""
    if COUNT == 1:
        return _load_part(p_part_out, p_part_lse, 2 * other, row, other <= last, D, BLOCK_M)
    else:
        HALF: tl.constexpr = COUNT // 2
        near = _load_parts(p_part_out, p_part_lse, other, last, row, D, BLOCK_M, HALF)
        far = _load_parts(p_part_out, p_part_lse, other + HALF, last, row, D, BLOCK_M, HALF)
        return _merge(near, far)


@triton.jit
def _load_part(p_part_out, p_part_lse, part, row, there, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """A row of a part from scratch: its attention [D], its lse, and its weight. Not there, it counts nothing."""
    o_row = part * BLOCK_M + row
    lse = tl.load(p_part_lse + o_row, mask=there, other=float("-inf"))
    out = tl.load(p_part_out + o_row.to(tl.int64) * D + tl.arange(0, D), mask=there, other=0.0)
    return out.to(tl.float32), lse, tl.where(lse == float("-inf"), 0.0, 1.0)


@triton.jit
def _merge(one, other):
    """Two weighted sums of parts as one: sums, the greatest lse, weights relative to it."""
    lse = tl.maximum(one[1], other[1])
    safe = tl.where(lse == float("-inf"), 0.0, lse)
    keep, take = tl.exp2(one[1] - safe), tl.exp2(other[1] - safe)
    return one[0] * keep + other[0] * take, lse, one[2] * keep + other[2] * take


def launch_split(arguments: dict[str, Any], plan: Plan, out: torch.Tensor) -> None:
    """Attention of the programs' runs, and the reduction. arguments: as from `kernels.launch.kernel_arguments`."""
    sizes = plan.sizes
    early = starts_early(out.device)
    _split_kernel[(sizes.programs,)](
        p_out=out,
        out_stride=out.stride(0),
        p_blocks=plan.blocks,
        p_runs=plan.runs,
        p_totals=plan.totals,
        p_part_out=plan.part_out,
        p_part_lse=plan.part_lse,
        programs=sizes.programs,
        BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n,
        ONE_LOOP=sizes.one_loop,
        BLOCK_FIELDS=BLOCK_FIELDS,
        RUN_FIELDS=RUN_FIELDS,
        EARLY=early,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        launch_pdl=early,
        **arguments,
    )
    kv_heads = arguments["kv_heads"]
    _add_up_kernel[(len(plan.blocks) * kv_heads, sizes.block_m)](
        out, out.stride(0), plan.blocks, plan.totals, plan.part_out, plan.part_lse, kv_heads, sizes.programs,
        GROUP=arguments["GROUP"], DIM=arguments["DIM"], D=arguments["D"], BLOCK_M=sizes.block_m,
        MERGED=MERGED, BLOCK_FIELDS=BLOCK_FIELDS, EARLY=early, num_warps=1, launch_pdl=early,
    )  # fmt: skip
