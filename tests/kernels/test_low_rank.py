"""The up-projection for mixed roles against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from lragent.kernels.low_rank import role_up, role_up_heads, role_up_reference

MIXES = {
    "all_distinct": [1, 2, 3, 0],
    "uniform": [2, 2, 2, 2, 2],
    "skewed": [1, 1, 1, 3, 1, 1],
    "base_only": [0, 0, 0],
    "one_token": [3],
    "nothing": [],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_role_up(mix: list[int], dtype: torch.dtype) -> None:
    roles = torch.tensor(mix, dtype=torch.long)
    low, up = random(len(mix), 4, dtype=dtype), random(3, 4, 10, dtype=dtype) / 4
    got = role_up(low, up, roles)
    assert got.dtype is dtype
    assert_close(got, role_up_reference(low, up, roles), torch.float32 if dtype is torch.float64 else dtype)
    assert not got[roles == 0].any()


def test_role_up_of_a_batch() -> None:
    roles, low, up = torch.tensor([2, 0, 1]), random(2, 5, 3, 4), random(2, 4, 6) / 4
    expected = torch.stack([role_up_reference(row, up, roles) for row in low.reshape(-1, 3, 4)]).reshape(2, 5, 3, 6)
    assert_close(role_up(low, up, roles), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_role_up_heads(mix: list[int], group: int, dtype: torch.dtype) -> None:
    kv_heads, dim, rank = 2, 5, 4
    roles = torch.tensor(mix, dtype=torch.long)
    low, up = random(kv_heads, group, len(mix), rank, dtype=dtype), random(3, rank, kv_heads * dim, dtype=dtype) / 4
    got = role_up_heads(low, up, roles)
    assert got.shape == (kv_heads, group, len(mix), dim)
    for kv in range(kv_heads):
        for g in range(group):
            own = up[..., kv * dim : (kv + 1) * dim]
            assert_close(got[kv, g], role_up_reference(low[kv, g], own, roles), dtype)


@pytest.mark.parametrize("role", [0, 1, 3])
def test_role_up_heads_of_one_role(role: int) -> None:
    low, up = random(2, 3, 4, 5), random(3, 5, 12)
    torch.testing.assert_close(role_up_heads(low, up, role), role_up_heads(low, up, torch.full((4,), role)))


def test_gradients() -> None:
    roles = torch.tensor([2, 0, 1, 2])
    up = random(2, 3, 4, dtype=torch.float64).requires_grad_()
    flat, heads = (random(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (2, 2, 4, 3)))
    assert torch.autograd.gradcheck(lambda low, up: role_up(low, up, roles), (flat, up))
    assert torch.autograd.gradcheck(lambda low, up: role_up_heads(low, up, roles), (heads, up))
    assert torch.autograd.gradcheck(lambda low, up: role_up_heads(low, up, 2), (heads, up))
