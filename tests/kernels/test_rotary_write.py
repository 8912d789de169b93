"""Rotary embedding with the cache's writes, in plain torch and as a kernel, against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_close

from lragent.kernels.rotary_write import FEW_TOKENS, rotary_write, rotary_write_reference, rotary_write_torch

POSITIONS, SLOTS, LOW_SLOTS = 50, 40, 30


@dataclass(frozen=True)
class Case:
    """base, low: the slots, -1 = not written; None = a slot of its own for every token.

    layout: how query, key and value lie in memory, all with the shape [T, H, D]. pools: which of heads and slots is
    the outer dimension.
    """

    tokens: int = 3
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    rank_v: int = 8
    rank_k: int = 0
    base: tuple[int, ...] | None = None
    low: tuple[int, ...] | None = None
    rope: bool = True
    rotate_key: bool = True
    layout: str = "tokens outer"
    pools: str = "heads outer"


CASES = {
    "several": Case(),
    "one_token": Case(tokens=1),
    "no_token": Case(tokens=0),
    "dim_80": Case(dim=80),
    "dim_96": Case(dim=96, kv_heads=4),
    "dim_128": Case(dim=128, heads=9, kv_heads=3),
    "dim_256": Case(dim=256, heads=3, kv_heads=1),
    "dim_2": Case(dim=2),
    "many_heads": Case(tokens=2, heads=28, kv_heads=4, dim=128),
    "many_kv_heads": Case(tokens=2, heads=12, kv_heads=12, dim=128),
    "no_low": Case(rank_v=0),
    "low_keys": Case(rank_k=5),
    "low_keys_only": Case(rank_v=0, rank_k=1),
    "odd_ranks": Case(rank_v=33, rank_k=17),
    "lr_prefill": Case(base=(-1, -1, -1)),
    "padding": Case(tokens=4, base=(7, -1, 0, -1), low=(3, -1, 29, -1)),
    "base_without_low": Case(base=(39, 1, 2), low=(-1, 5, -1)),
    "rotated_already": Case(rope=False, rank_k=4),
    "raw_keys": Case(rotate_key=False, rank_k=4),
    "heads_outer": Case(layout="heads outer"),
    "fused": Case(layout="fused", rank_k=4),
    "pools_slots_outer": Case(pools="slots outer"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cpu" and request.param is torch.bfloat16:
        pytest.skip("bfloat16 in Triton's interpreter is not what a device computes")
    return request.param


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """query, key, value, and low_v, low_k where the case has them."""
    shapes = {"query": (case.heads, case.dim), "key": (case.kv_heads, case.dim), "value": (case.kv_heads, case.dim)}
    if case.layout == "fused":  # slices of one projection's output, whose rows are wider than any of them
        widths = [heads * dim for heads, dim in shapes.values()] + [case.rank_v, case.rank_k]
        parts = torch.randn(case.tokens, sum(widths), device=device).to(dtype).split(widths, dim=1)
        named = dict(zip((*shapes, "low_v", "low_k"), parts, strict=True))
        return {
            name: part.unflatten(1, shapes[name]) if name in shapes else part
            for name, part in named.items()
            if part.shape[1]
        }
    found = {}
    for name, (heads, dim) in shapes.items():
        if case.layout == "heads outer":
            found[name] = torch.randn(heads, case.tokens, dim, device=device).to(dtype).transpose(0, 1)
        else:
            found[name] = torch.randn(case.tokens, heads, dim, device=device).to(dtype)
    for name, rank in (("low_v", case.rank_v), ("low_k", case.rank_k)):
        if rank:
            found[name] = torch.randn(case.tokens, rank, device=device).to(dtype)
    return found


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """All NaN, with more NaN in the memory on either side, so that what is written by mistake shows."""
    size, margin = math.prod(shape), 1024
    return torch.full((size + 2 * margin,), torch.nan, dtype=dtype, device=device)[margin:-margin].view(shape)


def written_anywhere(tensor: torch.Tensor) -> int:
    """How many numbers of `tensor`'s memory, margins included, are not NaN."""
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return int((~memory.isnan()).sum())


def pools(case: Case, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("key_pool", "value_pool"):
        if case.pools == "slots outer":
            found[name] = poisoned(SLOTS, case.kv_heads, case.dim, dtype=dtype, device=device).transpose(0, 1)
        else:
            found[name] = poisoned(case.kv_heads, SLOTS, case.dim, dtype=dtype, device=device)
    for name, rank in (("low_v_pool", case.rank_v), ("low_k_pool", case.rank_k)):
        if rank:
            found[name] = poisoned(LOW_SLOTS, rank, dtype=dtype, device=device)
    return found


def indices(case: Case, device: str) -> dict[str, torch.Tensor]:
    """positions, base_slots, low_slots."""
    base = torch.randperm(SLOTS)[: case.tokens] if case.base is None else torch.tensor(case.base)
    low = torch.randperm(LOW_SLOTS)[: case.tokens] if case.low is None else torch.tensor(case.low)
    positions = torch.randint(POSITIONS, (case.tokens,))
    found = {"positions": positions, "base_slots": base, "low_slots": low}
    return {name: tensor.int().to(device) for name, tensor in found.items()}


def tables(dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as transformers makes them, both halves equal."""
    angles = torch.arange(POSITIONS).unsqueeze(1) * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos().to(device), angles.sin().to(device)


def call(form: Callable[..., None], case: Case, tensors: dict[str, torch.Tensor]) -> None:
    """`form` with the tensors by name, and None for those that the case does not have."""
    options = dict.fromkeys(("low_v", "low_k", "low_v_pool", "low_k_pool")) | tensors
    device = str(tensors["query"].device)
    form(**options, rope=tables(case.dim, device) if case.rope else None, rotate_key=case.rotate_key)


def assert_as_defined(
    form: Callable[..., None], case: Case, dtype: torch.dtype, device: str, pool_dtype: torch.dtype | None = None
) -> None:
    """`form` leaves query and pools as the definition does in float32, and everything else as it was."""
    got = inputs(case, dtype, device) | pools(case, pool_dtype or dtype, device) | indices(case, device)
    before = {name: tensor.clone() for name, tensor in got.items()}
    expected = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    call(rotary_write_reference, case, expected)
    call(form, case, got)
    for name, tensor in got.items():
        if name == "query" or name.endswith("pool"):
            written = ~expected[name].isnan()
            assert torch.equal(~tensor.isnan(), written), f"{name}: other slots were written"
            assert name == "query" or written_anywhere(tensor) == written.sum(), f"{name}: written beside the pool"
            coarser = dtype if pool_dtype is None or name == "query" else pool_dtype
            assert_close(tensor[written], expected[name][written], coarser)
        else:
            assert torch.equal(tensor, before[name]), f"{name} is only read"


@each_case
def test_kernel(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_as_defined(rotary_write, case, dtype, device)


@each_case
def test_torch(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_as_defined(rotary_write_torch, case, dtype, device)


@pytest.mark.parametrize("form", [rotary_write, rotary_write_torch], ids=["kernel", "torch"])
def test_pools_of_another_dtype(form: Callable[..., None], device: str) -> None:
    assert_as_defined(form, Case(rank_k=3), torch.float32, device, pool_dtype=torch.float16)


def test_many_tokens(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of tokens blocks are larger."""
    monkeypatch.setattr("lragent.kernels.rotary_write.FEW_TOKENS", 2)
    assert FEW_TOKENS > 2
    assert_as_defined(rotary_write, Case(tokens=3, heads=20, kv_heads=5, dim=128), torch.float32, device)


def test_copies_are_exact(device: str) -> None:
    case = Case(rotate_key=False, rank_k=4)
    tensors = inputs(case, torch.float16, device) | pools(case, torch.float16, device) | indices(case, device)
    call(rotary_write, case, tensors)
    for name, slots in (("key", "base_slots"), ("value", "base_slots")):
        written = tensors[f"{name}_pool"][:, tensors[slots].long()].transpose(0, 1)
        assert torch.equal(written, tensors[name])
    for name in ("low_v", "low_k"):
        assert torch.equal(tensors[f"{name}_pool"][tensors["low_slots"].long()], tensors[name])


def test_the_definition_is_transformers_rotation(device: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    case = Case(dim=16)
    tensors = inputs(case, torch.float32, device) | pools(case, torch.float32, device) | indices(case, device)
    cos, sin = (table[tensors["positions"].long()].unsqueeze(0) for table in tables(case.dim, device))
    heads_first = [tensors[name].clone().transpose(0, 1).unsqueeze(0) for name in ("query", "key")]
    query, key = (states[0].transpose(0, 1) for states in apply_rotary_pos_emb(*heads_first, cos, sin))
    call(rotary_write_reference, case, tensors)
    assert_close(tensors["query"], query, torch.float32)
    assert_close(tensors["key_pool"][:, tensors["base_slots"].long()].transpose(0, 1), key, torch.float32)


@pytest.mark.parametrize("big", ["key_pool", "value_pool", "low_v_pool"])
def test_offsets_beyond_32_bits(big: str, device: str) -> None:
    """The last slot of a pool of more than 2^31 numbers. No memory stands behind the slots that are not touched."""
    case = Case(tokens=1, kv_heads=1, dim=128, rank_v=128, rotate_key=False)
    slots = (1 << 24) + 8
    tensors = inputs(case, torch.float16, device) | indices(case, device)
    for name in ("key_pool", "value_pool", "low_v_pool"):
        one = torch.empty(1, 1, case.dim, dtype=torch.float16, device=device)
        pool = torch.empty(1, slots, case.dim, dtype=torch.float16, device=device) if name == big else one
        pool = pool.expand(1, slots, case.dim)  # one slot in the place of all
        tensors[name] = pool[0] if name == "low_v_pool" else pool
    for name in ("base_slots", "low_slots"):
        tensors[name].fill_(slots - 1)
    call(rotary_write, case, tensors)
    got, expected = tensors[big].reshape(slots, case.dim), tensors[big.removesuffix("_pool")]
    assert torch.equal(got[-1], expected.reshape(case.dim))


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Captured once, it follows the slots and positions that are in place when it runs."""
    case = Case(tokens=4, heads=8, dim=128, rank_k=4)
    tensors = inputs(case, torch.bfloat16, "cuda") | pools(case, torch.bfloat16, "cuda") | indices(case, "cuda")
    rope, query = tables(case.dim, "cuda"), tensors["query"].clone()
    rotary_write(**tensors, rope=rope)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotary_write(**tensors, rope=rope)
    for base, low in (((1, 5, -1, 0), (2, -1, -1, 9)), ((-1, -1, 3, 2), (1, 0, -1, 3))):
        fresh = indices(Case(tokens=4, base=base, low=low), "cuda") | pools(case, torch.bfloat16, "cuda")
        for name, tensor in (fresh | {"query": query}).items():
            tensors[name].copy_(tensor)
        graph.replay()
        expected = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        expected |= {name: t.float() for name, t in fresh.items() if name.endswith("pool")} | {"query": query.float()}
        rotary_write_reference(**expected, rope=rope)
        for name in ("query", "key_pool", "value_pool", "low_v_pool", "low_k_pool"):
            written = ~expected[name].isnan()
            assert torch.equal(~tensors[name].isnan(), written)
            assert_close(tensors[name][written], expected[name][written], torch.bfloat16)


WRONG = {
    "query": lambda t: {"query": t["query"][:, :, :63]},
    "key": lambda t: {"key": t["key"][:, :, :32]},
    "value": lambda t: {"value": t["value"][:2]},
    "positions": lambda t: {"positions": t["positions"].long()},
    "base_slots": lambda t: {"base_slots": t["base_slots"][:1]},
    "low_slots": lambda t: {"low_slots": t["low_slots"].float()},
    "key_pool": lambda t: {"key_pool": t["key_pool"].transpose(0, 1)},
    "value_pool": lambda t: {"value_pool": t["value_pool"][:, :7]},
    "low_v_pool": lambda t: {"low_v_pool": None},
    "low_k_pool": lambda t: {"low_k": t["low_v"]},
    "low_v": lambda t: {"low_v": t["low_v"].t().contiguous().t()},
}


@pytest.mark.parametrize("form", [rotary_write, rotary_write_torch], ids=["kernel", "torch"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str, form: Callable[..., None], device: str) -> None:
    case = CASES["several"]
    tensors = inputs(case, torch.float32, device) | pools(case, torch.float32, device) | indices(case, device)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(form, case, tensors | WRONG[name](tensors))


def test_wrong_rope_is_named(device: str) -> None:
    case = CASES["several"]
    tensors = inputs(case, torch.float32, device) | pools(case, torch.float32, device) | indices(case, device)
    cos, sin = tables(case.dim, device)
    options = dict.fromkeys(("low_v", "low_k", "low_v_pool", "low_k_pool")) | tensors
    with pytest.raises(ValueError, match=r"^rope\[1\]: "):
        rotary_write(**options, rope=(cos, sin[:, : case.dim // 2]))
    with pytest.raises(ValueError, match=r"^low_slots: must be given"):
        rotary_write(**options | {"low_slots": None}, rope=(cos, sin))
