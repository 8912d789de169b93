"""What the kernels of `varlen.py` have in common: tiles of memory, tiles of scores, and which keys a tile sees.

Scores are kept in the base of two, as the hardware's exponential is: `exp(scale s) = exp2(to_log2(scale) s)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(p_tile, m_rows, m_cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """A tile [R, C] at the pointers p_tile; m_rows [R, 1], m_cols [1, C]: where it has memory. Zero elsewhere."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(p_tile, mask=m_rows & m_cols, other=0.0)
    if MASK_ROWS:
        return tl.load(p_tile, mask=m_rows, other=0.0)
    if MASK_COLS:
        return tl.load(p_tile, mask=m_cols, other=0.0)
    return tl.load(p_tile)


@triton.jit
def raw_scores(b_left, b_right, scale, CAP: tl.constexpr):
    """The scores [R, C] of b_left [R, D] and b_right [C, D], up to the factor of `to_log2`: with a cap, the tanh."""
    b_scores = tl.dot(b_left, tl.trans(b_right), input_precision="ieee")
    if CAP is not None:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which holds at both ends: exp(2x) may be 0 or infinite.
        b_scores = 1 - 2 / (tl.exp2(b_scores * (scale * (2 * LOG2E / CAP))) + 1)
    return b_scores


@triton.jit
def to_log2(scale, CAP: tl.constexpr):
    """What `raw_scores` are to be multiplied by, to be the exponents of a softmax to the base of two."""
    if CAP is not None:
        return CAP * LOG2E
    else:
        return scale * LOG2E


@triton.jit
def seen(o_queries, o_keys, WINDOW: tl.constexpr):
    """Which queries see which keys, by their places in the trajectory, in the shape that the two broadcast to."""
    m_seen = o_queries >= o_keys
    if WINDOW is not None:
        m_seen = m_seen & (o_queries - o_keys < WINDOW)
    return m_seen


@triton.jit
def key_ranges(m0, length, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):
    """The keys of the queries m0..m0+BM, as four places: of `lo..a..b..hi` only `a..b` is seen by every query."""
    hi = tl.minimum(m0 + BM, length)
    b = (m0 + 1) // BN * BN
    lo = 0
    a = 0
    if WINDOW is not None:
        lo = tl.maximum(0, m0 - WINDOW + 1) // BN * BN
        a = tl.minimum((tl.maximum(0, hi - WINDOW) + BN - 1) // BN * BN, b)
    return lo, a, b, hi
