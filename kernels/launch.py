"""From tensors to the arguments that both attention kernels take."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton

from lragent.kernels.cached import CachedBatch, LayerCache, Readers

LOG2_E = 1.4426950408889634


def padded(size: int) -> int:
    """The power of two, at least 16, that a dimension of `size` takes on chip."""
    return max(16, triton.next_power_of_2(size))


@lru_cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch, from Hopper on).

    Such a kernel must wait in every program before it touches anything that kernels before it read or wrote, whether
    it has work or not: whoever comes next relies on it.
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def kernel_arguments(
    query: torch.Tensor,
    cache: LayerCache,
    batch: CachedBatch,
    readers: Readers,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """Pointers, strides and compile-time facts. Absent tensors are stood in for by one that is never read."""
    heads, dim = query.shape[1:]
    kv_heads = cache.key.shape[0]
    rank_v, rank_k = (0 if low is None else low.shape[1] for low in (cache.low_v, cache.low_k))
    low_v, low_k = (query if low is None else low for low in (cache.low_v, cache.low_k))
    up_v, up_k = (query if up is None else up for up in (readers.up_v, readers.up_k))
    cos, sin = (query, query) if readers.rope is None else readers.rope
    norm = query if readers.key_norm is None else readers.key_norm
    return {
        "p_query": query, "query_stride": query.stride(0), "head_stride": query.stride(1),
        "p_key": cache.key, "key_head_stride": cache.key.stride(0),
        "p_value": cache.value, "value_head_stride": cache.value.stride(0),
        "p_low_v": low_v, "p_low_k": low_k,
        "p_slots": batch.slots, "p_low_slots": batch.low_slots,
        "table_stride": batch.slots.stride(0), "low_table_stride": batch.low_slots.stride(0),
        "p_roles": batch.roles,
        "p_up_v": up_v, "up_v_role": up_v.stride(0), "up_v_rank": up_v.stride(1),
        "p_up_k": up_k, "up_k_role": up_k.stride(0), "up_k_rank": up_k.stride(1),
        "p_cos": cos, "p_sin": sin, "rope_stride": cos.stride(0), "p_norm": norm, "key_eps": readers.key_eps,
        "kv_heads": kv_heads, "qk_scale": scale * LOG2_E, "softcap": softcap or 0.0, "window": window or 0,
        # As compile-time facts, so that rows of 8 numbers are known to be aligned and are read whole.
        "key_stride": cache.key.stride(1), "value_stride": cache.value.stride(1),
        "low_v_stride": low_v.stride(0), "low_k_stride": low_k.stride(0),
        "GROUP": heads // kv_heads, "DIM": dim, "D": padded(dim), "HALF": padded(-(-dim // 2)),
        "RANK_V": rank_v, "RV": padded(rank_v), "RANK_K": rank_k, "RK": padded(rank_k),
        "SAME_SLOTS": batch.slots is batch.low_slots, "WINDOWED": window is not None, "SOFTCAP": softcap is not None,
        "NORMALISED": readers.key_norm is not None,
        "PRECISION": "ieee" if query.dtype is torch.float32 else "tf32",
    }  # fmt: skip
