"""The varlen kernels against attention over each trajectory alone, in float64: results and every gradient.

Without a GPU they run in Triton's interpreter, which multiplies bfloat16 tiles wrongly: there in float32 and float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tolerances import TOLERANCES, assert_close

pytest.importorskip("triton")

from lragent.kernels.attention import lora_attention, visible
from lragent.kernels.varlen import varlen_attention, varlen_lora_attention
from lragent.kernels.varlen_layout import ALIGNED, Blocks, Tile, VarlenLayout

N_ROLES = 2
SMALL = Blocks(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
"""So that a few dozen tokens make several tiles; of queries and of keys once the one side is longer, once the other."""


@dataclass(frozen=True)
class Case:
    """rank: 0 = without an LR cache. lengths: of the trajectories. blocks: None = as the dtype and D would have it."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    rank: int = 8
    lengths: tuple[int, ...] = (1, 32, 45)
    window: int | None = None
    softcap: float | None = None
    blocks: Blocks | None = SMALL
    strided: bool = True

    @property
    def spans(self) -> list[tuple[int, int]]:
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.dim**-0.5, "window": self.window, "softcap": self.softcap, "blocks": self.blocks}


CASES = {
    "plain": Case(),
    "no-low": Case(rank=0),
    "one-token": Case(lengths=(1,)),
    "only-single-tokens": Case(lengths=(1, 1, 1)),
    "exactly-a-tile": Case(lengths=(32, 16)),
    "a-tile-and-one": Case(lengths=(33, 17)),
    "a-tile-less-one": Case(lengths=(31, 15)),
    "empty-trajectory": Case(lengths=(5, 0, 6)),
    "heads-9-3": Case(heads=9, kv_heads=3, rank=3, lengths=(19, 7)),
    "heads-28-4": Case(heads=28, kv_heads=4, dim=16, rank=3, lengths=(18,)),
    "heads-3-3": Case(heads=3, kv_heads=3, rank=3, lengths=(18, 5)),
    "dim-80": Case(dim=80, lengths=(20, 3)),
    "dim-96-no-low": Case(dim=96, rank=0, lengths=(20, 3)),
    "dim-128": Case(heads=2, kv_heads=1, dim=128, lengths=(35,)),
    "dim-256": Case(heads=1, kv_heads=1, dim=256, lengths=(18,)),
    "rank-1": Case(rank=1, lengths=(20, 3)),
    "rank-40": Case(rank=40, lengths=(20, 3)),
    "rank-128": Case(heads=2, rank=128, lengths=(20,)),
    "window-of-one": Case(window=1),
    "window-below-a-tile": Case(window=7, lengths=(50, 3)),
    "window-of-a-tile": Case(window=16, lengths=(50,)),
    "window-over-tiles": Case(window=35, lengths=(80, 5)),
    "window-wider-than-all": Case(window=100),
    "window-no-low": Case(window=35, rank=0, lengths=(80,)),
    "softcap": Case(softcap=1.5),
    "softcap-window-no-low": Case(softcap=1.5, window=9, rank=0),
    "contiguous": Case(strided=False),
}
FEW = ("plain", "no-low", "dim-80", "window-over-tiles", "softcap")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield
    monkeypatch.undo()


def tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """query, key, value, and with a rank low and up; sharp enough that the weights differ."""
    tokens = sum(case.lengths)
    shapes = {"query": (case.heads, case.dim), "key": (case.kv_heads, case.dim), "value": (case.kv_heads, case.dim)}
    made = {name: torch.randn(tokens, *shape, dtype=torch.float64).transpose(0, 1) for name, shape in shapes.items()}
    if not case.strided:
        made = {name: tensor.contiguous() for name, tensor in made.items()}
    made["query"] *= 2
    made["value"] /= 2
    if case.rank:
        made["low"] = torch.randn(tokens, case.rank, dtype=torch.float64) / 2
        made["up"] = torch.randn(N_ROLES, case.rank, case.kv_heads * case.dim, dtype=torch.float64) / case.rank
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in made.items()}


def apart(case: Case, inputs: dict[str, torch.Tensor], roles: torch.Tensor) -> torch.Tensor:
    """Each trajectory alone."""
    outs = []
    for start, end in case.spans:
        query, key, value = (inputs[name][:, start:end] for name in ("query", "key", "value"))
        low = inputs["low"][start:end] if case.rank else None
        up, readers = inputs.get("up"), roles[start:end]
        if start == end:
            continue
        if case.softcap is None:
            options = {"scale": case.options["scale"], "window": case.window}
            outs.append(lora_attention(query, key, value, low, up, readers, **options))
        else:
            outs.append(capped(case, query, key, value, low, up, readers))
    return torch.cat(outs)


def capped(
    case: Case,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    roles: torch.Tensor,
) -> torch.Tensor:
    """With a soft cap, by the definition: every reader's own values, written out."""
    assert case.softcap is not None
    group = case.heads // case.kv_heads
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = case.softcap * torch.tanh(query @ key.transpose(1, 2) * case.options["scale"] / case.softcap)
    hidden = ~visible(len(roles), len(roles), query.device, None, case.window)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    if low is None or up is None:
        return (weights @ value).transpose(0, 1)
    outs = []
    for t, role in enumerate(roles.tolist()):
        full = value
        if role:
            added = (low @ up[role - 1]).view(-1, case.kv_heads, case.dim).transpose(0, 1)
            full = value + added.repeat_interleave(group, 0)
        outs.append((weights[:, t : t + 1] @ full)[:, 0])
    return torch.stack(outs)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = tensors(case, dtype, device)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    roles = torch.randint(0, N_ROLES + 1, (sum(case.lengths),), device=device)
    layout = VarlenLayout.of(case.spans, torch.device(device))
    three = [inputs[name] for name in ("query", "key", "value")]
    up = inputs.get("up")
    if up is not None:
        up = up.mT.contiguous().mT  # as training's projections give it
    got = varlen_lora_attention(*three, inputs.get("low"), up, roles, layout, **case.options)
    want = apart(case, exact, roles)
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert_close(got, want, dtype)
    chosen = torch.randn_like(got) / max(4, len(got) ** 0.5)  # gradients are sums over tokens: of order one so
    gradients = torch.autograd.grad(got, list(inputs.values()), chosen)
    expected = torch.autograd.grad(want, list(exact.values()), chosen.double())
    for name, mine, theirs in zip(inputs, gradients, expected, strict=True):
        assert mine.dtype is dtype, name
        assert_close(mine, theirs, dtype)
        # Small gradients would pass in any case: hold all together to their own size, as far as they have one.
        size = theirs.norm() + 0.05 * theirs.numel() ** 0.5
        assert (mine - theirs).norm() <= TOLERANCES[dtype]["rtol"] * size, name


def usual(device: str) -> torch.dtype:
    """The dtype that every case is tested in."""
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_every_gradient(case: Case, device: str) -> None:
    check(case, usual(device), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_in_the_other_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles wrongly")
    if dtype is usual(device):
        pytest.skip("every case is tested in it above")
    check(CASES[name], dtype, device)


SHAPES = {
    **{f"{dim}-{rank}": Case(4, 2, dim, rank) for dim in (64, 80, 128, 256) for rank in (0, 16, 128)},
    "128-8-window": Case(dim=128, window=100),
    "128-0-window": Case(dim=128, rank=0, window=200),
    "128-40": Case(dim=128, rank=40),
    "128-8-softcap": Case(dim=128, softcap=1.5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_with_the_tiles_of_every_shape(name: str) -> None:
    check(replace(SHAPES[name], lengths=(300, 1, 128, 129, 64), blocks=None), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256], ids="dim-{}".format)
def test_with_the_tiles_of_every_dtype(dim: int, dtype: torch.dtype) -> None:
    check(Case(dim=dim, lengths=(300, 1, 128, 129, 64), blocks=None), dtype, "cuda")


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    case = Case(8, 2, 128, 16, (700, 300, 1, 1000), None, None, None)
    inputs, layout = tensors(case, torch.bfloat16, "cuda"), VarlenLayout.of(case.spans, torch.device("cuda"))

    def once() -> list[torch.Tensor]:
        out, low_out = varlen_attention(*list(inputs.values())[:4], layout, **case.options)
        assert low_out is not None
        return [out, low_out, *torch.autograd.grad(out.sum() + low_out.sum(), list(inputs.values())[:4])]

    first = once()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))


def test_both_accumulators_and_a_gradient_without_memory(device: str) -> None:
    """`sum()` hands down an expanded gradient; and one accumulator may have none at all."""
    case = CASES["plain"]
    inputs = tensors(case, torch.float32, device)
    four = [inputs[name] for name in ("query", "key", "value", "low")]
    layout = VarlenLayout.of(case.spans, four[0].device)
    out, low_out = varlen_attention(*four, layout, **case.options)
    assert low_out is not None
    widened = [*four[:2], torch.cat((four[2], four[3].expand(case.kv_heads, -1, -1)), dim=-1)]
    want = torch.cat([
        lora_attention(*(x[:, start:end] for x in widened[:2]), widened[2][:, start:end, i : i + case.dim], scale=0.125)
        for i in (0, case.rank) for start, end in case.spans
    ]).view(2, sum(case.lengths), case.heads, case.dim)  # fmt: skip
    assert_close(out, want[0], torch.float32)
    assert_close(low_out, want[1, ..., -case.rank :], torch.float32)
    mine = torch.autograd.grad(low_out.sum(), four)
    theirs = torch.autograd.grad(want[1, ..., -case.rank :].sum(), [*four[:2], four[3]])
    assert not mine[2].any(), "nothing was asked of the values"
    for one, other in zip((mine[0], mine[1], mine[3]), theirs, strict=True):
        assert_close(one, other, torch.float32)


def test_low_keeps_a_dtype_of_its_own(device: str) -> None:
    case = CASES["plain"]
    inputs = tensors(case, torch.float16, device)
    low = inputs["low"].detach().float().requires_grad_()
    layout = VarlenLayout.of(case.spans, low.device)
    out, low_out = varlen_attention(*list(inputs.values())[:3], low, layout, **case.options)
    assert low_out is not None
    assert low_out.dtype is torch.float16
    (grad,) = torch.autograd.grad(low_out.float().sum() + out.float().sum(), [low])
    assert grad.dtype is torch.float32


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the interpreter, about the NaN
def test_nothing_is_read_across(device: str) -> None:
    """Not even what is no number."""
    case = Case(lengths=(20, 33, 7))
    inputs = tensors(case, torch.float32, device)
    layout = VarlenLayout.of(case.spans, inputs["low"].device)
    four = [inputs[name] for name in ("query", "key", "value", "low")]
    spoilt = [x.detach().clone() for x in four]
    for x in spoilt:
        x[..., 20:53, :] = float("nan")
        x.requires_grad_()
    results = []
    for given in (four, spoilt):
        out, low_out = varlen_attention(*given, layout, **case.options)
        assert low_out is not None
        own = torch.cat((out[:20].flatten(), out[53:].flatten(), low_out[:20].flatten(), low_out[53:].flatten()))
        gradients = torch.autograd.grad(own.sum(), given)
        results.append([own, *(torch.cat((x[..., :20, :], x[..., 53:, :]), dim=-2) for x in gradients)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_tiles_cover_every_token_once_and_the_longest_come_first() -> None:
    spans = [(0, 1), (1, 70), (70, 70), (70, 102)]
    layout = VarlenLayout.of(spans, torch.device("cpu"))
    assert layout.tokens == 102
    assert layout.filled_tokens == 3 * ALIGNED
    queries, keys = layout.query_tiles(32).tolist(), layout.key_tiles(32).tolist()
    assert sorted(queries) == sorted(keys) == [
        [0, 1, 0, 0], [1, 69, 0, ALIGNED], [1, 69, 32, ALIGNED], [1, 69, 64, ALIGNED], [70, 32, 0, 2 * ALIGNED],
    ]  # fmt: skip
    assert [row[2] for row in queries] == [64, 32, 0, 0, 0], "late queries see most keys"
    assert [row[1] - row[2] for row in keys] == [69, 37, 32, 5, 1], "early keys are seen by most queries"
    assert layout.query_tiles(32) is layout.query_tiles(32)


@pytest.mark.parametrize("spans", [[(1, 3)], [(0, 3), (4, 5)], [(0, 3), (3, 2)], [(0, 0)], []], ids=str)
def test_spans_that_do_not_cover_the_batch_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"^spans: must"):
        VarlenLayout.of(spans, torch.device("cpu"))


@pytest.mark.parametrize("size", [8, 24, 256])
def test_sides_of_a_tile_are_checked(size: int) -> None:
    with pytest.raises(ValueError, match=r"^keys: .* not \d+"):
        Tile(16, size, 4, 1)


WRONG: dict[str, Any] = {
    "query": torch.zeros(4, 53, 64),
    "key": torch.zeros(2, 54, 80),
    "value": torch.zeros(2, 54, 64, dtype=torch.float64),
    "low": torch.zeros(54, 129),
    "up": torch.zeros(2, 8, 64),
    "roles": torch.zeros(54),
    "layout": VarlenLayout.of([(0, 54)], torch.device("meta")),
    "scale": 0.0,
    "window": 0,
    "softcap": -1.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(4, 54, 64), "key": torch.zeros(2, 54, 64), "value": torch.zeros(2, 54, 64),
        "low": torch.zeros(54, 8), "up": torch.zeros(2, 8, 128), "roles": torch.zeros(54, dtype=torch.long),
        "layout": VarlenLayout.of([(0, 54)], torch.device("cpu")), "scale": 0.1, "window": 5, "softcap": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}: "):
        varlen_lora_attention(**{**arguments, name: WRONG[name]})


@pytest.mark.parametrize(("shape", "said"), [((3, 54, 64), "multiple of 2 heads"), ((4, 54, 257), "at most 256")])
def test_heads_are_checked(shape: tuple[int, ...], said: str) -> None:
    key = torch.zeros(2, 54, shape[2])
    with pytest.raises(ValueError, match=f"^query: .*{said}"):
        varlen_attention(torch.zeros(shape), key, key, None, VarlenLayout.of([(0, 54)], key.device), scale=0.1)
