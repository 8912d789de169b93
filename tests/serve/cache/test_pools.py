"""Where the tensors lie: no entry over another, and LR pages inside the slots that they are."""

from __future__ import annotations

import pytest
import torch

from lragent.errors import UserError
from lragent.serve.cache.pools import CachePools, CacheShape

SLOTS = 6
LLAMA_8B = {"layers": 32, "kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize(
    ("heads", "dim", "rank_v", "rank_k", "entry"),
    [
        (8, 128, 8, 0, 8),
        (8, 128, 8, 8, 16),
        (8, 128, 24, 0, 32),
        (3, 64, 8, 0, 8),  # SmolLM2-135M: 384 numbers
        (3, 64, 20, 0, 24),
        (3, 64, 33, 32, 96),
        (2, 16, 64, 0, 64),
        (1, 10, 3, 0, 4),  # no multiple of 8 divides 20
        (8, 128, 0, 0, 8),
    ],
)
def test_an_entry_is_the_smallest_that_divides_a_slot(
    heads: int, dim: int, rank_v: int, rank_k: int, entry: int
) -> None:
    shape = CacheShape(2, heads, dim, rank_v, rank_k)
    assert shape.entry == entry
    assert shape.lr_per_slot * entry == shape.width


def test_ranks_larger_than_a_slot_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"--sharing base_shared.*80 together.*64 numbers"):
        _ = CacheShape(2, 2, 16, 40, 40).entry


@pytest.mark.parametrize("paged", [False, True])
def test_no_entry_lies_over_another(paged: bool) -> None:
    """In paged pools slots 2 and 4 are pages, the others hold base entries."""
    shape = CacheShape(3, 2, 8, rank_v=4, rank_k=3)
    pools = CachePools(shape, SLOTS, torch.float32, "cpu", paged=paged)
    assert pools.low_v is not None
    assert pools.low_k is not None
    per = shape.lr_per_slot
    assert per == 4
    base = [0, 1, 3, 5] if paged else list(range(SLOTS))
    low = [*range(2 * per, 3 * per), *range(4 * per, 5 * per)] if paged else list(range(SLOTS))
    expected = []
    for layer in range(3):
        views = [pools.key[layer, :, slot] for slot in base] + [pools.value[layer, :, slot] for slot in base]
        views += [pools.low_v[layer, slot] for slot in low] + [pools.low_k[layer, slot] for slot in low]
        for view in views:
            view.fill_(len(expected))
            expected.append(view)
    for number, view in enumerate(expected):
        assert (view == number).all()
    assert all(t.stride(-1) == 1 for t in (pools.key, pools.value, pools.low_v, pools.low_k))


def test_bytes_by_part() -> None:
    shape = CacheShape(**LLAMA_8B, rank_v=8)
    assert shape.base_bytes(torch.bfloat16) == 131_072
    assert shape.lr_bytes(torch.bfloat16) == 512
    small = CacheShape(2, 2, 8, 4, 0)
    beside = CachePools(small, SLOTS, torch.float32, "cpu", paged=False)
    paged = CachePools(small, SLOTS, torch.float32, "cpu", paged=True)
    assert beside.base_bytes == paged.base_bytes == SLOTS * small.base_bytes(torch.float32) == 6 * 2 * 32 * 4
    assert (beside.lr_bytes, paged.lr_bytes) == (SLOTS * small.lr_bytes(torch.float32), 0)
