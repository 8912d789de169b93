"""How a step's attention is divided over the GPU, worked out on the device once per step and used by all layers.

A *block* is up to BLOCK_M rows of one sequence, a row being one query head of one new token (the G query heads that
share a key head stand side by side, so that a tile of keys is read once for all of them). A *tile* is BLOCK_N tokens of
context. A *unit* is one tile of one block for one key head. Units are numbered block by block, head by head, tile by
tile, and `programs` programs take runs of equal length (stream-K): one long sequence fills the GPU as well as many
short ones. Where a run ends inside a block, its part of the result goes to scratch, to be added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lragent.kernels.cached import CachedBatch

BLOCK_FIELDS = 10
"""First token of the sequence, its number of new tokens, its context, its row in the slot tables; the block's first
row, first and past-the-end tile, units of one head before it; its least role but the base, and its greatest."""

RUN_FIELDS = 16
"""Units, block, key head, tile, then the block's fields; a power of two, so that a run lies in one line of the
cache."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that a kernel is compiled for.

    programs: 0 where every block has programs of its own. one_loop: whether the split kernel masks every tile, rather
    than have a loop without masks before; fewer instructions to begin with, more for each tile.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 0
    one_loop: bool = True


@dataclass(frozen=True)
class Plan:
    """What the programs of one step do. Tensors are int32 but for the scratch; a captured graph fills them anew.

    blocks: [most_blocks, BLOCK_FIELDS], all that a program must know of a block, read at one go: the latencies of loads
    that wait for one another would be most of a short step. runs: [programs, RUN_FIELDS], where each program begins:
    units, block, key head, tile, then that block's fields. totals: [2], units of one head, and blocks. part_out:
    [2 * programs, BLOCK_M, D], part_lse: [2 * programs, BLOCK_M] float32, what a program has of its first and of its
    last block: attention over its tiles, in the query's dtype as more would cost bandwidth, and the logarithm of the
    softmax's sum.
    """

    sizes: Sizes
    blocks: torch.Tensor
    runs: torch.Tensor
    totals: torch.Tensor
    part_out: torch.Tensor
    part_lse: torch.Tensor

    @classmethod
    def empty(cls, sizes: Sizes, batch: CachedBatch, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Plan:
        """Room for every batch of as many tokens and sequences; `make` fills it. dim: padded, as on chip; dtype: the
        query's."""
        sequences, tokens, device = len(batch.context), len(batch.roles), batch.context.device
        most_blocks = sequences + tokens * (heads // kv_heads) // sizes.block_m
        parts = 2 * sizes.programs

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            sizes,
            blocks=ints(most_blocks, BLOCK_FIELDS),
            runs=ints(max(sizes.programs, 1), RUN_FIELDS),
            totals=ints(2),
            part_out=torch.empty(parts, sizes.block_m, dim, dtype=dtype, device=device),
            part_lse=torch.empty(parts, sizes.block_m, dtype=torch.float32, device=device),
        )

    def make(self, batch: CachedBatch, heads: int, kv_heads: int, window: int | None) -> None:
        """Work out who does what, on the device, in one launch."""
        sequences = len(batch.context)
        group = heads // kv_heads
        most_of_one = triton.cdiv(batch.most_new * group, self.sizes.block_m)
        _plan_kernel[(sequences, most_of_one)](
            batch.query_start,
            batch.context,
            batch.rows,
            batch.roles,
            self.blocks,
            self.runs,
            self.totals,
            sequences,
            kv_heads,
            max(self.sizes.programs, 1),
            most_of_one,
            window or 0,
            GROUP=group,
            BLOCK_M=self.sizes.block_m,
            BLOCK_N=self.sizes.block_n,
            SPLIT=self.sizes.programs > 0,
            WINDOWED=window is not None,
            SEQUENCES=triton.next_power_of_2(sequences),
            PROGRAMS=triton.next_power_of_2(max(self.sizes.programs, 1)),
            BLOCK_FIELDS=BLOCK_FIELDS,
            RUN_FIELDS=RUN_FIELDS,
        )


@triton.jit
def _tiles_of(
    b, fresh, context, window, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr
):
    """First and past-the-end tile of block `b` of a sequence of `fresh` new tokens; equal where there is no such
    block."""
    rows = fresh * GROUP
    first_row = b * BLOCK_M
    last = context - fresh + (tl.minimum(first_row + BLOCK_M, rows) - 1) // GROUP  # position of the last query
    high = last // BLOCK_N + 1
    low = high * 0
    if WINDOWED:
        low = tl.maximum(context - fresh + first_row // GROUP - window + 1, 0) // BLOCK_N
    there = first_row < rows
    return tl.where(there, low, 0), tl.where(there, high, 0)


@triton.jit
def _plan_kernel(
    p_query_start, p_context, p_rows, p_roles, p_blocks, p_runs, p_totals,
    sequences, kv_heads, programs, most_of_one, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
    SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_FIELDS: tl.constexpr, RUN_FIELDS: tl.constexpr,
):  # fmt: skip
    """One program per block that there may be; each adds up what comes before it, so that none waits for another."""
    s, b = tl.program_id(0), tl.program_id(1)
    o_s = tl.arange(0, SEQUENCES)
    m_s = o_s < sequences
    starts = tl.load(p_query_start + o_s, mask=m_s, other=0)
    fresh = tl.load(p_query_start + o_s + 1, mask=m_s, other=0) - starts  # [SEQUENCES]
    context = tl.load(p_context + o_s, mask=m_s, other=0)
    blocks = tl.cdiv(fresh * GROUP, BLOCK_M)
    index = tl.sum(tl.where(o_s < s, blocks, 0), 0) + b
    before = tl.sum(fresh, 0) * 0
    total = before
    if SPLIT:
        units = fresh * 0
        for other in range(most_of_one):
            low, high = _tiles_of(other, fresh, context, window, GROUP, BLOCK_M, BLOCK_N, WINDOWED)
            units += high - low
            before += tl.sum(tl.where((o_s == s) & (other < b), high - low, 0), 0)
        before += tl.sum(tl.where(o_s < s, units, 0), 0)
        total = tl.sum(units, 0)
    if (s == 0) & (b == 0):
        tl.store(p_totals, total)
        tl.store(p_totals + 1, tl.sum(blocks, 0))
    o_p = tl.arange(0, PROGRAMS)
    first = run_start(o_p, total * kv_heads, programs)
    length = run_start(o_p + 1, total * kv_heads, programs) - first
    if SPLIT and (s == 0) & (b == 0):  # who has work; the rest of a run is written by the block that it begins with
        tl.store(p_runs + o_p * RUN_FIELDS, length, mask=o_p < programs)
    own_fresh = tl.sum(tl.where(o_s == s, fresh, 0), 0)
    if b * BLOCK_M < own_fresh * GROUP:
        own_start = tl.sum(tl.where(o_s == s, starts, 0), 0)
        own_context = tl.sum(tl.where(o_s == s, context, 0), 0)
        own_row = tl.load(p_rows + s)
        low, high = _tiles_of(b, own_fresh, own_context, window, GROUP, BLOCK_M, BLOCK_N, WINDOWED)
        o_m = b * BLOCK_M + tl.arange(0, BLOCK_M)
        roles = tl.load(p_roles + own_start + o_m // GROUP, mask=o_m < own_fresh * GROUP, other=0)
        most = tl.max(roles, 0)
        least = tl.minimum(tl.min(tl.where(roles > 0, roles, 1 << 30), 0), most)
        p_block = p_blocks + index * BLOCK_FIELDS
        _store_block(
            p_block, own_fresh > 0, own_start, own_fresh, own_context, own_row, b * BLOCK_M, low, high, before,
            least, most,
        )  # fmt: skip
        if SPLIT:
            inside = first - before * kv_heads  # [PROGRAMS], units into this block
            m_p = (o_p < programs) & (length > 0) & (inside >= 0) & (inside < (high - low) * kv_heads)
            p_run = p_runs + o_p * RUN_FIELDS
            tl.store(p_run + 1, index, mask=m_p)
            tl.store(p_run + 2, inside // (high - low), mask=m_p)
            tl.store(p_run + 3, low + inside % (high - low), mask=m_p)
            _store_block(
                p_run + 4, m_p, own_start, own_fresh, own_context, own_row, b * BLOCK_M, low, high, before,
                least, most,
            )  # fmt: skip


@triton.jit
def _store_block(p_block, mask, start, fresh, context, row, first_row, low, high, before, least, most):
    """Write a block's fields, in the order of BLOCK_FIELDS, to one place or to several."""
    tl.store(p_block, start, mask=mask)
    tl.store(p_block + 1, fresh, mask=mask)
    tl.store(p_block + 2, context, mask=mask)
    tl.store(p_block + 3, row, mask=mask)
    tl.store(p_block + 4, first_row, mask=mask)
    tl.store(p_block + 5, low, mask=mask)
    tl.store(p_block + 6, high, mask=mask)
    tl.store(p_block + 7, before, mask=mask)
    tl.store(p_block + 8, least, mask=mask)
    tl.store(p_block + 9, most, mask=mask)


@triton.jit
def load_block(p_block):
    """The fields of a block, in the order of BLOCK_FIELDS; independent loads, so one latency."""
    return (
        tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2), tl.load(p_block + 3), tl.load(p_block + 4),
        tl.load(p_block + 5), tl.load(p_block + 6), tl.load(p_block + 7), tl.load(p_block + 8), tl.load(p_block + 9),
    )  # fmt: skip


@triton.jit
def run_start(program, units, programs):
    """The first unit of a program's run: the first `units % programs` runs are one unit longer."""
    return program * (units // programs) + tl.minimum(program, units % programs)


@triton.jit
def run_of(unit, units, programs):
    """The program whose run holds `unit`."""
    short = units // programs
    long = units % programs
    past_long = long * (short + 1)
    return tl.where(unit < past_long, unit // (short + 1), long + (unit - past_long) // tl.maximum(short, 1))
