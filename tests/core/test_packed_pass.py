"""A pass over whole trajectories attends alike on every device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_close

from lragent.attention import PackedPass
from lragent.kernels.attention import lora_attention
from lragent.routing import Route

SPANS, ROLES = ((0, 7), (7, 40)), [0, 1, 2, 1, 2, 0, 1, *[2, 1, 0] * 11]
SHAPES: dict[str, tuple[int, ...]] = {
    "query": (4, 40, 16), "key": (2, 40, 16), "value": (2, 40, 16), "low": (40, 3), "up": (2, 3, 32),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "soft_cap"])
def test_each_trajectory_alone_through_the_readers_b(
    split: bool, window: int | None, softcap: float | None, device: str
) -> None:
    given = {name: torch.randn(shape, device=device, requires_grad=True) for name, shape in SHAPES.items()}
    route = Route.of(ROLES, device, frozenset({"v_proj"} if split else ()))
    projection = SimpleNamespace(take_low=lambda: given["low"][None], reader_up=lambda: given["up"])
    layer: Any = SimpleNamespace(v_proj=projection)
    three = [given[name] for name in ("query", "key", "value")]
    out = PackedPass(SPANS, route).attend(layer, *three, 0.3, window, softcap)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    low, up = (exact["low"], exact["up"]) if split else (None, None)
    want = torch.cat([
        lora_attention(
            *(exact[name][:, a:b] for name in ("query", "key", "value")), None if low is None else low[a:b], up,
            route.roles[a:b], scale=0.3, window=window, softcap=softcap,
        )
        for a, b in SPANS
    ])  # fmt: skip
    assert_close(out, want, torch.float32)
    chosen = torch.randn_like(out)
    names = list(given) if split else ["query", "key", "value"]
    mine = torch.autograd.grad(out, [given[name] for name in names], chosen)
    theirs = torch.autograd.grad(want, [exact[name] for name in names], chosen.double())
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other, torch.float32)
