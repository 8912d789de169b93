"""The up-projection for many roles, in plain torch and as a kernel, against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close

from lragent.kernels import grouped_up
from lragent.kernels.grouped_up import group_by_role, grouped_up_, grouped_up_reference_, grouped_up_torch_
from lragent.kernels.low_rank import role_up

MIXES = {
    "all_distinct": list(range(19, 0, -1)),
    "uniform": [2] * 20,
    "skewed": [1, 1, 1, 3, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 7, 1],
    "base_among_roles": [0, 3, 0, 0, 5, 3, 0],
    "base_only": [0] * 5,
    "one_token": [3],
    "more_than_a_block": [1 + (7 * t) % 4 for t in range(37)],
    "one_of_256": [256],
    "some_of_256": [256, 1, 130, 0, 256, 131],
}
each_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cpu" and request.param is torch.bfloat16:
        pytest.skip("bfloat16 in Triton's interpreter is not what a device computes")
    return request.param


@pytest.fixture(params=["each_alone", "by_roles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kernels, which are chosen by size."""
    monkeypatch.setattr(grouped_up, "each_alone", lambda *_: request.param == "each_alone")
    return request.param


def tensors(
    mix: list[int], rank: int, d_out: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, low, up, roles. `low` is NaN where the role is 0: nobody reads it."""
    n_roles = max([1, *mix])
    out, low = (torch.randn(len(mix), size, device=device).to(dtype) for size in (d_out, rank))
    up = (torch.randn(n_roles, rank, d_out, device=device) / rank**0.5).to(dtype)
    roles = torch.tensor(mix, dtype=torch.int32, device=device)
    low[roles == 0] = torch.nan
    return out, low, up, roles


def assert_as_defined(
    form: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    order: torch.Tensor | None = None,
) -> None:
    out, low, up, roles = inputs
    before = out.clone()
    expected = grouped_up_reference_(out.float().clone(), low, up, roles)
    assert form(out, low, up, roles, order) is out
    assert_close(out, expected, out.dtype)
    assert torch.equal(out[roles == 0], before[roles == 0])


@pytest.mark.parametrize("ordered", [False, True], ids=["as_they_come", "grouped"])
@each_mix
def test_mixes(mix: list[int], ordered: bool, way: str, dtype: torch.dtype, device: str) -> None:
    inputs = tensors(mix, 8, 24, dtype, device)
    assert_as_defined(grouped_up_, inputs, group_by_role(inputs[3]) if ordered else None)


@pytest.mark.parametrize(("rank", "d_out"), [(1, 1), (3, 130), (16, 129), (33, 64), (128, 40), (200, 7)])
def test_sizes(rank: int, d_out: int, way: str, dtype: torch.dtype, device: str) -> None:
    assert_as_defined(grouped_up_, tensors(MIXES["base_among_roles"], rank, d_out, dtype, device))


def test_many_tokens(device: str) -> None:
    """Blocks are larger there, and the choice of the kernel is its own."""
    mix = torch.randint(0, 4, (600,)).tolist()
    inputs = tensors(mix, 16, 32, torch.float16, device)
    assert_as_defined(grouped_up_, inputs, group_by_role(inputs[3]))


@each_mix
def test_torch(mix: list[int], dtype: torch.dtype, device: str) -> None:
    inputs = tensors(mix, 8, 24, dtype, device)
    assert_as_defined(grouped_up_torch_, inputs, group_by_role(inputs[3]))


@pytest.mark.parametrize("form", [grouped_up_, grouped_up_torch_], ids=["kernel", "torch"])
def test_no_tokens(form: Callable[..., torch.Tensor], device: str) -> None:
    out, low, up, _ = tensors([1], 8, 24, torch.float32, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert form(out[:0], low[:0], up, none, none).shape == (0, 24)


@pytest.mark.parametrize("row", [24 + 8 + 8, 24 + 8 + 3], ids=["rows_of_40", "rows_of_35"])
def test_in_place_within_a_fused_output(row: int, way: str, device: str) -> None:
    """Columns beside those of `out` are NaN and stay so."""
    whole = torch.full((19, row), torch.nan, device=device)
    out, low, up, roles = tensors(MIXES["all_distinct"], 8, 24, torch.float32, device)
    whole[:, :24], whole[:, 24:32] = out, low
    assert_as_defined(grouped_up_, (whole[:, :24], whole[:, 24:32], up, roles))
    assert torch.equal(whole[:, 24:32], low)
    assert whole[:, 32:].isnan().all()


def test_output_of_another_dtype(way: str, device: str) -> None:
    out, low, up, roles = tensors(MIXES["skewed"], 8, 24, torch.float16, device)
    assert_as_defined(grouped_up_, (out.float(), low, up, roles))


def test_the_definition_is_the_dense_product(device: str) -> None:
    out, low, up, roles = tensors(MIXES["skewed"], 8, 24, torch.float32, device)
    expected = out + role_up(low, up, roles)
    assert_close(grouped_up_reference_(out, low, up, roles), expected, torch.float32)


def test_group_by_role(device: str) -> None:
    roles = torch.tensor([2, 0, 1, 2, 0], dtype=torch.int32, device=device)
    order = group_by_role(roles)
    assert order.dtype is torch.int32
    assert order.tolist() == [1, 4, 2, 0, 3]


def test_the_order_is_followed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no result, so only a false one can show: here it leads everybody to a token of the base."""
    monkeypatch.setattr(grouped_up, "each_alone", lambda *_: False)
    out, low, up, roles = tensors(MIXES["base_among_roles"], 8, 24, torch.float32, device)
    before = out.clone()
    grouped_up_(out, low, up, roles, torch.zeros_like(roles))
    assert torch.equal(out, before)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Captured once, it follows the roles that are in place when it runs."""
    out, low, up, roles = tensors(torch.randint(1, 8, (200,)).tolist(), 16, 256, torch.bfloat16, "cuda")

    def step() -> None:
        grouped_up_(out, low, up, roles, group_by_role(roles))

    before = out.clone()
    step()  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for mix in (roles.flip(0), torch.ones_like(roles), torch.zeros_like(roles)):
        out.copy_(before)
        roles.copy_(mix)
        graph.replay()
        assert_close(out, grouped_up_reference_(before.float(), low, up, roles), torch.bfloat16)


WRONG = {
    "out": lambda t: {"out": t["out"].double()},
    "low": lambda t: {"low": t["low"][:2]},
    "up": lambda t: {"up": t["up"].transpose(1, 2)},
    "roles": lambda t: {"roles": t["roles"].long()},
    "order": lambda t: {"order": t["roles"][:3]},
}


@pytest.mark.parametrize("form", [grouped_up_, grouped_up_torch_], ids=["kernel", "torch"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str, form: Callable[..., torch.Tensor], device: str) -> None:
    inputs = tensors(MIXES["uniform"], 8, 24, torch.float32, device)
    named = dict(zip(("out", "low", "up", "roles"), inputs, strict=True))
    with pytest.raises(ValueError, match=f"^{name}: "):
        form(**named | WRONG[name](named))
    with pytest.raises(ValueError, match=r"^low: the rank must be"):
        form(**named | {"low": named["low"][:, :0]})
