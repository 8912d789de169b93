"""Linears that keep no inputs, as ZeRO-3 needs them."""

from __future__ import annotations

import copy

import torch
from tolerances import STEP_TOLERANCES
from torch import nn

from lragent.train.zero import keep_no_inputs


def layer() -> nn.Sequential:
    """A frozen linear with a bias, one without, and one that learns."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 50), nn.Linear(50, 7, bias=False), nn.Linear(7, 3))
    made[:2].requires_grad_(False)
    return made


def kept(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What it gives, and what is kept for its backward pass."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        return module(x), saved


def test_frozen_linears_give_the_same_and_keep_their_weights_alone() -> None:
    plain = layer()
    less = copy.deepcopy(plain)
    keep_no_inputs(less)
    x = torch.randn(4, 5, 6)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, saved = kept(less, mine)
    expected = plain(theirs)
    out.square().sum().backward()
    expected.square().sum().backward()
    close = STEP_TOLERANCES[torch.float32]
    torch.testing.assert_close(out, expected, atol=close, rtol=close)
    torch.testing.assert_close(mine.grad, theirs.grad, atol=close, rtol=close)
    torch.testing.assert_close(less[2].weight.grad, plain[2].weight.grad, atol=close, rtol=close)
    assert less[0].weight.grad is None
    assert not any(tensor.shape[-1] == 50 and tensor.dim() == 3 for tensor in saved), "the second one's input"
    assert any(tensor is less[0].weight for tensor in saved), "itself, so that DeepSpeed's changes to it are seen"
