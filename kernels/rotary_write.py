"""Rotary embedding and the writing of a layer's cache, in one launch.

A layer's queries and keys are rotated, and keys, `V_base` and the LR activations go to their slots. As separate
operations that is a dozen small kernels a layer, which is much of what a decode step costs beside reading the weights.

Shapes, the same for all three forms below:
query [T, Hq, D], rotated in place; key, value [T, Hkv, D], only read; low_v [T, rv], low_k [T, rk] or None.
rope: cos and sin, tables of [positions, D] whose halves are equal, as transformers makes them; None where query and key
come rotated. positions [T] int32: each token's row of the tables, always a valid one.
base_slots, low_slots [T] int32: where a token's key and value, and its LR activations, go; -1 writes nothing (an LR
prefill writes LR only, padding writes nothing). Slots must differ from token to token.
key_pool, value_pool [Hkv, slots, D]; low_v_pool [low slots, rv], low_k_pool [low slots, rk]: present where low_v and
low_k are; low_slots may be None where both are absent. Every dimension but the last may have any stride.
rotate_key: False stores keys as they come (models that normalise keys cache them raw) and rotates queries only.

Rotation is computed in float32 and rounded once, to the dtype of the query or of the pool.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lragent.kernels.checks import FLOATS, MOST_RANK_COPIED, Arguments, check_rank
from lragent.kernels.launch import starts_early

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, [positions, D] each."""

FEW_TOKENS = 256
"""Up to this many tokens a program takes few heads, so that even one token keeps several processors busy."""


def rotary_write_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    low_k: torch.Tensor | None,
    rope: Rope | None,
    positions: torch.Tensor,
    base_slots: torch.Tensor,
    low_slots: torch.Tensor | None,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    low_v_pool: torch.Tensor | None,
    low_k_pool: torch.Tensor | None,
    *,
    rotate_key: bool = True,
) -> None:
    """The definition, number by number: coordinate i and its partner i + D/2 turn by the angle of their position.

    See the module for shapes.
    """
    tokens, heads, dim = query.shape
    half = dim // 2

    def rotated(row: torch.Tensor, token: int) -> torch.Tensor:
        if rope is None:
            return row
        cos, sin = (table[positions[token]].float() for table in rope)
        old, new = row.float(), torch.empty_like(row, dtype=torch.float32)
        for i in range(half):
            new[i] = old[i] * cos[i] - old[i + half] * sin[i]
            new[i + half] = old[i + half] * cos[i] + old[i] * sin[i]
        return new

    for token in range(tokens):
        for head in range(heads):
            query[token, head] = rotated(query[token, head], token)
        slot = int(base_slots[token])
        if slot >= 0:
            for head in range(key.shape[1]):
                row = key[token, head]
                key_pool[head, slot] = rotated(row, token) if rotate_key else row
                value_pool[head, slot] = value[token, head]
        for low, pool in ((low_v, low_v_pool), (low_k, low_k_pool)):
            if low is not None and pool is not None and low_slots is not None and low_slots[token] >= 0:
                pool[int(low_slots[token])] = low[token]


def rotary_write_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    low_k: torch.Tensor | None,
    rope: Rope | None,
    positions: torch.Tensor,
    base_slots: torch.Tensor,
    low_slots: torch.Tensor | None,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    low_v_pool: torch.Tensor | None,
    low_k_pool: torch.Tensor | None,
    *,
    rotate_key: bool = True,
) -> None:
    """The same in plain torch, for any device; on CUDA it waits for the device. See the module for shapes.

    Raises ValueError naming the argument that does not fit.
    """
    _check(
        query, key, value, low_v, low_k, rope, positions, base_slots, low_slots,
        key_pool, value_pool, low_v_pool, low_k_pool,
    )  # fmt: skip
    if rope is not None:
        index = positions.long()
        cos, sin = (table[index, : query.shape[2] // 2].float().unsqueeze(1) for table in rope)  # [T, 1, D/2]
        query.copy_(_rotated(query, cos, sin))
        if rotate_key:
            key = _rotated(key, cos, sin)
    written = torch.nonzero(base_slots >= 0).squeeze(1)
    slots = base_slots[written].long()
    key_pool[:, slots] = key[written].transpose(0, 1).to(key_pool.dtype)
    value_pool[:, slots] = value[written].transpose(0, 1).to(value_pool.dtype)
    if low_slots is not None:
        written = torch.nonzero(low_slots >= 0).squeeze(1)
        slots = low_slots[written].long()
        for low, pool in ((low_v, low_v_pool), (low_k, low_k_pool)):
            if low is not None and pool is not None:
                pool[slots] = low[written].to(pool.dtype)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """states: [T, H, D]; cos, sin: [T, 1, D/2]. Returns float32."""
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    low_k: torch.Tensor | None,
    rope: Rope | None,
    positions: torch.Tensor,
    base_slots: torch.Tensor,
    low_slots: torch.Tensor | None,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    low_v_pool: torch.Tensor | None,
    low_k_pool: torch.Tensor | None,
    *,
    rotate_key: bool = True,
) -> None:
    """The same in one Triton launch, which does not wait for the device and can be captured in a CUDA graph.

    See the module for shapes. Raises ValueError naming the argument that does not fit.
    """
    _check(
        query, key, value, low_v, low_k, rope, positions, base_slots, low_slots,
        key_pool, value_pool, low_v_pool, low_k_pool,
    )  # fmt: skip
    if query.shape[0] == 0:
        return
    _launch(
        query, key, value, low_v, low_k, rope, positions, base_slots, low_slots,
        key_pool, value_pool, low_v_pool, low_k_pool, rotate_key,
    )  # fmt: skip


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    low_k: torch.Tensor | None,
    rope: Rope | None,
    positions: torch.Tensor,
    base_slots: torch.Tensor,
    low_slots: torch.Tensor | None,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    low_v_pool: torch.Tensor | None,
    low_k_pool: torch.Tensor | None,
) -> None:
    arguments = Arguments(query.device)
    arguments.tensor("query", query, "T Hq D", FLOATS)
    if arguments["D"] % 2 or not arguments["D"]:
        raise ValueError(f"query: the head dimension must be even and positive, not {arguments['D']}.")
    arguments.tensor("key", key, "T Hkv D", FLOATS)
    arguments.tensor("value", value, "T Hkv D", FLOATS)
    if rope is not None:
        arguments.tensor("rope[0]", rope[0], "positions D", FLOATS)
        arguments.tensor("rope[1]", rope[1], "positions D", FLOATS)
    arguments.tensor("positions", positions, "T", torch.int32)
    arguments.tensor("base_slots", base_slots, "T", torch.int32)
    if low_slots is not None:
        arguments.tensor("low_slots", low_slots, "T", torch.int32)
    arguments.tensor("key_pool", key_pool, "Hkv slots D", FLOATS)
    arguments.tensor("value_pool", value_pool, "Hkv slots D", FLOATS)
    for name, low, pool, rank in (("low_v", low_v, low_v_pool, "rv"), ("low_k", low_k, low_k_pool, "rk")):
        if (low is None) != (pool is None):
            raise ValueError(f"{name}_pool: must be given where {name} is, and only there.")
        if low is not None and pool is not None:
            if low_slots is None:
                raise ValueError(f"low_slots: must be given where {name} is.")
            arguments.tensor(name, low, f"T {rank}", FLOATS)
            check_rank(name, low.shape[1], MOST_RANK_COPIED)
            arguments.tensor(f"{name}_pool", pool, f"lowslots {rank}", FLOATS)


def _blocks(tokens: int, heads: int, kv_heads: int, half: int) -> dict[str, int]:
    """Sizes of the blocks: 64 threads, each with 16 bytes (8 numbers of 16 bits) of one or two rows at a time."""
    columns = triton.next_power_of_2(half)
    at_once = max(512 // columns, 1)  # rows of half a head that 64 threads take at once
    rows = at_once if tokens <= FEW_TOKENS else 2 * at_once
    return {
        "BLOCK_C": columns,
        "BLOCK_Q": min(rows, triton.next_power_of_2(heads)),
        "BLOCK_KV": min(at_once, triton.next_power_of_2(kv_heads)),
        "num_warps": 2,
    }


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    low_k: torch.Tensor | None,
    rope: Rope | None,
    positions: torch.Tensor,
    base_slots: torch.Tensor,
    low_slots: torch.Tensor | None,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    low_v_pool: torch.Tensor | None,
    low_k_pool: torch.Tensor | None,
    rotate_key: bool,
) -> None:
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    assert dim % 2 == 0
    assert key.shape == value.shape == (tokens, kv_heads, dim)
    assert key_pool.shape[::2] == value_pool.shape[::2] == (kv_heads, dim)
    assert all(x.stride(-1) == 1 for x in (query, key, value, key_pool, value_pool))
    cos, sin = rope if rope is not None else (None, None)
    blocks = _blocks(tokens, heads, kv_heads, dim // 2)
    early = starts_early(query.device)
    query_parts = triton.cdiv(heads, blocks["BLOCK_Q"]) if rope is not None else 0
    kv_parts = triton.cdiv(kv_heads, blocks["BLOCK_KV"])
    rank_v = 0 if low_v is None else low_v.shape[1]
    rank_k = 0 if low_k is None else low_k.shape[1]
    # Triton sees of a stride whether it is a multiple of 16. Rows of a fused projection's output are often multiples of
    # 8 only, which is enough to read 16 bytes at a time, but must be told.
    strides = [
        stride if size > 1 else 0  # never taken, and torch may make it anything
        for states in (query, key, value)
        for size, stride in zip(states.shape[:2], states.stride()[:2], strict=True)
    ]
    unit = math.gcd(*strides, 8)
    # Tokens come first: that axis of a grid has no limit that matters, the other ends at 65,535.
    _rotary_write_kernel[(tokens, query_parts + kv_parts)](
        query, key, value, low_v, low_k, cos, sin, positions, base_slots, low_slots,
        key_pool, value_pool, low_v_pool, low_k_pool,
        *(stride // unit for stride in strides),
        0 if low_v is None else low_v.stride(0), 0 if low_k is None else low_k.stride(0),
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
        key_pool.stride(0), key_pool.stride(1), value_pool.stride(0), value_pool.stride(1),
        0 if low_v_pool is None else low_v_pool.stride(0), 0 if low_k_pool is None else low_k_pool.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, RANK_V=rank_v, RANK_K=rank_k,
        ROTATE_KEY=rotate_key and rope is not None, QUERY_PARTS=query_parts, UNIT=unit,
        BLOCK_RV=triton.next_power_of_2(max(rank_v, 1)), BLOCK_RK=triton.next_power_of_2(max(rank_k, 1)),
        EARLY=early, launch_pdl=early, **blocks,
    )  # fmt: skip


@triton.jit(  # one compilation for all: the unit says what matters about these
    do_not_specialize=["s_query_t", "s_query_h", "s_key_t", "s_key_h", "s_value_t", "s_value_h"]
)
def _rotary_write_kernel(  # type: ignore[no-untyped-def]  # Triton takes the types of parameters from each launch
    p_query, p_key, p_value, p_low_v, p_low_k, p_cos, p_sin, p_positions, p_base_slots, p_low_slots,
    p_key_pool, p_value_pool, p_low_v_pool, p_low_k_pool,
    s_query_t, s_query_h, s_key_t, s_key_h, s_value_t, s_value_h, s_low_v, s_low_k, s_cos, s_sin,
    s_key_pool_h, s_key_pool_s, s_value_pool_h, s_value_pool_s, s_low_v_pool, s_low_k_pool,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, RANK_V: tl.constexpr, RANK_K: tl.constexpr,
    ROTATE_KEY: tl.constexpr, QUERY_PARTS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_RV: tl.constexpr, BLOCK_RK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one token, and BLOCK_Q query heads or BLOCK_KV key and value heads. `s_` is a stride; those of
    query, key and value count in units of UNIT.

    Offsets of tokens, heads and slots are int64: a pool of some hundred thousand slots has more than 2^31 numbers.
    All is read before anything is waited for, so that one token takes about as long as its longest chain: position,
    angles, store.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    o_c = tl.arange(0, BLOCK_C)  # [BC], the first half's columns
    position = 0
    if QUERY_PARTS > 0:
        position = tl.load(p_positions + token)
    if part < QUERY_PARTS:
        if QUERY_PARTS > 0:  # else this is not compiled
            o_q = part * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BQ]
            p_q = (
                p_query + (token * s_query_t + o_q.to(tl.int64)[:, None] * s_query_h) * UNIT + o_c[None, :]
            )  # [BQ, BC]
            FITS_Q: tl.constexpr = (HEADS % BLOCK_Q == 0) and (HALF == BLOCK_C)
            m_q = None if FITS_Q else (o_q < HEADS)[:, None] & (o_c < HALF)[None, :]
            b_q1 = tl.load(p_q, mask=m_q)
            b_q2 = tl.load(p_q + HALF, mask=m_q)
            b_cos = _angles(p_cos, s_cos, position, o_c, HALF, BLOCK_C)
            b_sin = _angles(p_sin, s_sin, position, o_c, HALF, BLOCK_C)
            b_r1, b_r2 = _rotate(b_q1, b_q2, b_cos, b_sin)
            tl.store(p_q, b_r1.to(p_query.dtype.element_ty), mask=m_q)
            tl.store(p_q + HALF, b_r2.to(p_query.dtype.element_ty), mask=m_q)
    else:
        o_h = (part - QUERY_PARTS) * BLOCK_KV + tl.arange(0, BLOCK_KV)  # [BKV]
        o_row = o_h.to(tl.int64)[:, None]
        FITS_KV: tl.constexpr = (KV_HEADS % BLOCK_KV == 0) and (HALF == BLOCK_C)
        m_kv = None if FITS_KV else (o_h < KV_HEADS)[:, None] & (o_c < HALF)[None, :]
        p_k = p_key + (token * s_key_t + o_row * s_key_h) * UNIT + o_c[None, :]  # [BKV, BC]
        p_v = p_value + (token * s_value_t + o_row * s_value_h) * UNIT + o_c[None, :]
        b_k1 = tl.load(p_k, mask=m_kv)
        b_k2 = tl.load(p_k + HALF, mask=m_kv)
        b_v1 = tl.load(p_v, mask=m_kv)
        b_v2 = tl.load(p_v + HALF, mask=m_kv)
        slot = tl.load(p_base_slots + token)
        if RANK_V > 0 or RANK_K > 0:
            low_slot = tl.load(p_low_slots + token)
        if RANK_V > 0:
            o_rv = tl.arange(0, BLOCK_RV)
            b_low_v = tl.load(p_low_v + token * s_low_v + o_rv, mask=o_rv < RANK_V)
        if RANK_K > 0:
            o_rk = tl.arange(0, BLOCK_RK)
            b_low_k = tl.load(p_low_k + token * s_low_k + o_rk, mask=o_rk < RANK_K)
        if ROTATE_KEY:
            b_cos = _angles(p_cos, s_cos, position, o_c, HALF, BLOCK_C)
            b_sin = _angles(p_sin, s_sin, position, o_c, HALF, BLOCK_C)
            b_k1, b_k2 = _rotate(b_k1, b_k2, b_cos, b_sin)
        if slot >= 0:
            o_slot = slot.to(tl.int64)
            p_new_k = p_key_pool + o_slot * s_key_pool_s + o_row * s_key_pool_h + o_c[None, :]
            p_new_v = p_value_pool + o_slot * s_value_pool_s + o_row * s_value_pool_h + o_c[None, :]
            tl.store(p_new_k, b_k1.to(p_key_pool.dtype.element_ty), mask=m_kv)
            tl.store(p_new_k + HALF, b_k2.to(p_key_pool.dtype.element_ty), mask=m_kv)
            tl.store(p_new_v, b_v1.to(p_value_pool.dtype.element_ty), mask=m_kv)
            tl.store(p_new_v + HALF, b_v2.to(p_value_pool.dtype.element_ty), mask=m_kv)
        if RANK_V > 0 or RANK_K > 0:
            if (low_slot >= 0) & (part == QUERY_PARTS):  # one program of a token's is enough
                o_low = low_slot.to(tl.int64)
                if RANK_V > 0:
                    p_new = p_low_v_pool + o_low * s_low_v_pool + o_rv
                    tl.store(p_new, b_low_v.to(p_new.dtype.element_ty), mask=o_rv < RANK_V)
                if RANK_K > 0:
                    p_new = p_low_k_pool + o_low * s_low_k_pool + o_rk
                    tl.store(p_new, b_low_k.to(p_new.dtype.element_ty), mask=o_rk < RANK_K)


@triton.jit
def _rotate(b_1, b_2, b_cos, b_sin):  # type: ignore[no-untyped-def]  # as above
    """The halves of some rows, turned against each other; float32."""
    b_1 = b_1.to(tl.float32)
    b_2 = b_2.to(tl.float32)
    return b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin


@triton.jit
def _angles(  # type: ignore[no-untyped-def]  # as above
    p_table, s_table, position, o_c, HALF: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """cos or sin of a position, [1, BC] float32."""
    m_c = None if HALF == BLOCK_C else o_c < HALF
    return tl.load(p_table + position.to(tl.int64) * s_table + o_c, mask=m_c).to(tl.float32)[None, :]
