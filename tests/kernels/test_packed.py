"""Attention over grouped, padded trajectories against each trajectory alone."""

from __future__ import annotations

import pytest
import torch

from lragent.kernels import packed
from lragent.kernels.attention import lora_attention
from lragent.kernels.packed import PackedLayout, packed_attention

SPANS = ((0, 7), (7, 8), (8, 20), (20, 29), (29, 40))
HEADS, KV_HEADS, DIM, RANK, N_ROLES = 6, 2, 8, 3, 2


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    tokens = SPANS[-1][1]
    shapes = {
        "query": (HEADS, tokens, DIM), "key": (KV_HEADS, tokens, DIM), "value": (KV_HEADS, tokens, DIM),
        "low": (tokens, RANK), "up": (N_ROLES, RANK, KV_HEADS * DIM),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("adapted", [True, False], ids=["low", "plain"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize("limit", [packed.SCORES_LIMIT, 100], ids=["written-out", "torch's-own"])
def test_forward_and_every_gradient(
    adapted: bool, window: int | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SCORES_LIMIT", limit)
    inputs = tensors()
    if not adapted:
        del inputs["low"], inputs["up"]
    roles = torch.randint(0, N_ROLES + 1, (SPANS[-1][1],))
    layout = PackedLayout.of(SPANS, torch.device("cpu"))
    low, up = inputs.get("low"), inputs.get("up")
    got = packed_attention(
        inputs["query"], inputs["key"], inputs["value"], low, up, roles, layout, scale=0.3, window=window
    )
    alone = [
        lora_attention(
            inputs["query"][:, a:b], inputs["key"][:, a:b], inputs["value"][:, a:b], None if low is None else low[a:b],
            up, roles[a:b], scale=0.3, window=window,
        )
        for a, b in SPANS
    ]  # fmt: skip
    want = torch.cat(alone)
    torch.testing.assert_close(got, want)
    chosen = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad((got * chosen).sum(), list(inputs.values())),
        torch.autograd.grad((want * chosen).sum(), list(inputs.values())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_groups_hold_like_lengths_and_every_token_once() -> None:
    layout = PackedLayout.of(SPANS, torch.device("cpu"))
    assert layout.shapes == ((3, 32), (1, 32), (1, 32)), "12, 11 and 9 together; 7 is too short for them"
    assert torch.equal(layout.take[layout.place], torch.arange(40))
    assert layout.place.unique().numel() == 40


def test_one_trajectory() -> None:
    layout = PackedLayout.of([(0, 5)], torch.device("cpu"))
    assert layout.shapes == ((1, 32),)
    assert layout.place.tolist() == [0, 1, 2, 3, 4]
    assert layout.take.tolist() == [0, 1, 2, 3, 4] + [0] * 27
