"""Flash-LoRA-Attention in plain torch against its definition, which materialises every reader's values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_close

from lragent.kernels import attention
from lragent.kernels.attention import lora_attention, lora_attention_reference, visible

ROLES, RANK, DIM = 3, 4, 8
SCALE = DIM**-0.5


@dataclass(frozen=True)
class Case:
    """kv_heads, group: query heads are kv_heads * group. positions: where the queries stand; None = at the end."""

    kv_heads: int = 2
    group: int = 2
    queries: int = 5
    keys: int = 9
    roles: tuple[int, ...] = (1, 2, 0, 3, 1)
    positions: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float | None = None


CASES = {
    "append": Case(),
    "whole_prompt": Case(queries=5, keys=5),
    "decode": Case(queries=1, roles=(2,)),
    "decode_first_token": Case(queries=1, keys=1, roles=(3,)),
    "decode_in_window": Case(queries=1, roles=(2,), window=4),
    "decode_base": Case(queries=1, roles=(0,)),
    "one_group": Case(kv_heads=3, group=1),
    "one_kv_head": Case(kv_heads=1, group=4),
    "window": Case(window=3),
    "window_of_one": Case(window=1),
    "window_wider_than_context": Case(window=50),
    "positions": Case(positions=(0, 3, 4, 8, 2)),
    "positions_and_window": Case(positions=(0, 3, 4, 8, 2), window=2),
    "soft_cap": Case(softcap=1.5),
    "soft_cap_and_window": Case(softcap=1.5, window=3),
    "uniform_role": Case(roles=(2, 2, 2, 2, 2)),
    "base_only": Case(roles=(0, 0, 0, 0, 0)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=["written_out", "widened"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the implementation, which chooses by size."""
    if request.param == "widened":
        monkeypatch.setattr(attention, "EXPLICIT_SCORES_LIMIT", -1)
    else:
        monkeypatch.setattr(attention, "_widened", None)
    return request.param


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """query, key, value, low, up."""
    shapes = (
        (case.kv_heads * case.group, case.queries, DIM),
        (case.kv_heads, case.keys, DIM),
        (case.kv_heads, case.keys, DIM),
        (case.keys, RANK),
        (ROLES, RANK, case.kv_heads * DIM),
    )
    query, key, value, low, up = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return [2 * query, key, value, low, up / 2]  # sharp enough that the weights differ


def options(case: Case) -> dict:
    positions = None if case.positions is None else torch.tensor(case.positions)
    return {"scale": SCALE, "positions": positions, "window": case.window, "softcap": case.softcap}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_equals_the_definition(case: Case, dtype: torch.dtype, path: str) -> None:
    inputs, roles = tensors(case, dtype), torch.tensor(case.roles)
    got = lora_attention(*inputs, roles, **options(case))
    assert got.dtype is dtype
    assert_close(got, lora_attention_reference(*inputs, roles, **options(case)), dtype)


@each_case
def test_without_an_lr_cache_it_is_plain_attention(case: Case, path: str) -> None:
    inputs = tensors(case)
    got = lora_attention(*inputs[:3], **options(case))
    assert_close(got, lora_attention_reference(*inputs[:3], **options(case)), torch.float32)
    assert_close(lora_attention(*inputs, None, **options(case)), got, torch.float32)


@pytest.mark.parametrize("role", [0, 2])
@each_case
def test_one_role_as_a_number(case: Case, role: int, path: str) -> None:
    inputs = tensors(case)
    roles = torch.full((case.queries,), role)
    expected = lora_attention_reference(*inputs, roles, **options(case))
    assert_close(lora_attention(*inputs, role, **options(case)), expected, torch.float32)


def test_the_definition_is_torchs_own_attention() -> None:
    query, key, value, low, up = tensors(CASES["whole_prompt"])
    full = value + (low @ up[1]).reshape(5, 2, DIM).transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], full[None], is_causal=True, scale=SCALE, enable_gqa=True
    )[0].transpose(0, 1)
    got = lora_attention_reference(query, key, value, low, up, torch.full((5,), 2), scale=SCALE)
    assert_close(got, expected, torch.float32)


def test_a_soft_cap_never_meets_torchs_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["soft_cap"]
    inputs, roles = tensors(case), torch.tensor(case.roles)
    monkeypatch.setattr(attention, "EXPLICIT_SCORES_LIMIT", -1)
    expected = lora_attention_reference(*inputs, roles, **options(case))
    assert_close(lora_attention(*inputs, roles, **options(case)), expected, torch.float32)
    by_hand = inputs[1][0] @ inputs[0][0].T * SCALE  # of the first head
    weights = torch.softmax(
        (1.5 * torch.tanh(by_hand / 1.5)).T.masked_fill(~visible(5, 9, by_hand.device, None, None), float("-inf")),
        dim=-1,
    )
    plain = lora_attention(*inputs, 0, **options(case))
    assert_close(plain[:, 0], weights @ inputs[2][0], torch.float32)


def test_readers_differ() -> None:
    """Or every test above could pass with the adapters left out."""
    case = CASES["append"]
    inputs = tensors(case)
    outs = [lora_attention(*inputs, role, **options(case)) for role in range(ROLES + 1)]
    for i, one in enumerate(outs):
        for other in outs[:i]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("name", ["append", "decode", "positions_and_window", "soft_cap", "base_only"])
def test_gradients(name: str, path: str) -> None:
    case = CASES[name]
    inputs = [x.requires_grad_() for x in tensors(case, torch.float64)]
    roles = torch.tensor(case.roles)
    assert torch.autograd.gradcheck(lambda *x: lora_attention(*x, roles, **options(case)), inputs)


def test_visible() -> None:
    whole = visible(3, 4, torch.device("cpu"), None, None)
    assert whole.tolist() == [[True, True, False, False], [True, True, True, False], [True, True, True, True]]
    near = visible(2, 4, torch.device("cpu"), torch.tensor([3, 1]), 2)
    assert near.tolist() == [[False, False, True, True], [True, True, False, False]]
