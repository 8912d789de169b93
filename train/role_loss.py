"""The losses of a flat batch under its roles.

`shared` trains as `base_lr_shared` serves: every position is processed once, by one role, and read by all, each reader
through its own `B`. `per_role` trains as `non_shared` serves: each role alone over its context, every position its own
(LRAgent, arXiv 2602.01053, trains so).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lragent.attention import PackedPass
from lragent.rope import rope_at
from lragent.routing import Route
from lragent.tied_lora import RoleModel
from lragent.train.batches import PackedBatch
from lragent.train.data import NO_TARGET

FLOATS_AT_ONCE = 1 << 22
"""Logits (positions x vocabulary) that are held in float32 at one time: 16 MiB."""

LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits that exist at one time, in the dtype of the base, by the type of the device."""

_RESCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of models that do something to the logits after the head."""


class RoleLoss(nn.Module):
    """The losses of a flat batch under its roles. A module, so that accelerate can wrap it for several processes."""

    def __init__(self, built: RoleModel, *, recompute: bool = False) -> None:
        """recompute: keep what goes into each layer only, and compute the rest again in the backward pass."""
        super().__init__()
        self.model = built.model
        self._built = built
        base = built.model.get_base_model()
        self._head_alone = _is_plain_head(base)
        if recompute:
            # transformers is giving this function a new name.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": self._contexts})

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a layer's forward pass, and around its recomputation, which needs the same route."""
        return nullcontext(), self._built.router.use(self._built.router.route)

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        roles: torch.Tensor,
        targets: torch.Tensor,
        loss_roles: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        one_pass: bool,
        judge: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """All tensors [T], as in `PackedBatch`. Returns [n_roles + 1] float32, the sum of the losses that each role
        authored the targets of (nobody's, at index 0, is zero); with `judge` also [T] whether each target is the
        likeliest token, True where there is none.

        The head runs on the positions that have targets only, and on so many at a time that all logits never exist.
        Raises UserError where an adapted `k_proj` cannot be split and a one-pass batch comes.
        """
        base = self.model.get_base_model()
        split = self._built.split() if one_pass else frozenset()
        route = Route(roles, None, split)
        rope = rope_at(base, position_ids, base.dtype) if "k_proj" in split else None
        counted = (targets != NO_TARGET).nonzero().squeeze(-1)
        inputs: dict[str, Any] = {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": position_ids.unsqueeze(0),
            "attention_pass": PackedPass(tuple(spans), route, rope),
            "use_cache": False,
        }
        with self._built.router.use(route):
            if self._head_alone:
                states = base.get_decoder()(**inputs).last_hidden_state[0][counted]
                losses, likeliest = self._through_head(base.get_output_embeddings(), states, targets[counted], judge)
            else:
                logits = base(**inputs, logits_to_keep=counted).logits[0]
                losses = _TokenLosses.apply(logits, targets[counted])
                likeliest = logits.argmax(-1) if judge else None
        onehot = loss_roles[counted] == torch.arange(len(self._built.roles) + 1, device=losses.device).unsqueeze(-1)
        sums: torch.Tensor = onehot.to(losses.dtype) @ losses  # not by index_add, whose order differs from run to run
        if likeliest is None:
            return sums
        right = torch.ones_like(targets, dtype=torch.bool)
        right[counted] = likeliest == targets[counted]
        return sums, right

    def _through_head(
        self, head: nn.Module, states: torch.Tensor, targets: torch.Tensor, judge: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """states: [n, d]; targets: [n]. Returns losses and, with `judge`, likeliest tokens, [n] each."""

        def some(part: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits = head(part)
            return _TokenLosses.apply(logits, wanted), logits.detach().argmax(-1) if judge else None

        vocabulary = self.model.get_base_model().config.vocab_size
        rows = max(1, LOGITS_AT_ONCE.get(states.device.type, LOGITS_AT_ONCE["cpu"]) // vocabulary)
        if len(targets) <= rows:
            return some(states, targets)
        pieces = [
            checkpoint(some, part, wanted, use_reentrant=False)
            for part, wanted in zip(states.split(rows), targets.split(rows), strict=True)
        ]
        losses, likeliest = zip(*pieces, strict=True)
        return torch.cat(losses), torch.cat(likeliest) if judge else None


def _is_plain_head(base: nn.Module) -> bool:
    """Whether a model's logits are what its head gives for the decoder's last states, and nothing else."""
    config: Any = base.config
    return not any(getattr(config, name, None) not in (None, 1.0) for name in _RESCALED)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of every row of logits [n, vocabulary], in float32 [n], a few rows at a time.

    The gradient is worked out with the loss and kept in the dtype of the logits, so that no float32 copy of all logits
    is ever written: on a CPU such copies cost more than what they are for.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, FLOATS_AT_ONCE // logits.shape[1])
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        ctx.grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, logits.shape[0], rows):
            part = logits[start : start + rows].to(torch.float32, copy=True)
            wanted = targets[start : start + rows].unsqueeze(-1)
            total = part.logsumexp(-1, keepdim=True)
            losses[start : start + rows] = (total - part.gather(-1, wanted)).squeeze(-1)
            if ctx.grad is not None:
                part.sub_(total).exp_().scatter_add_(-1, wanted, torch.full_like(total, -1.0))
                ctx.grad[start : start + rows] = part
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        own, ctx.grad = ctx.grad, None
        return own.mul_(grad.unsqueeze(-1).to(own.dtype)), None


def loss_inputs(batch: PackedBatch, one_pass: bool) -> dict[str, Any]:
    """A batch as the keyword arguments of `RoleLoss`."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "roles": batch.roles,
        "targets": batch.targets,
        "loss_roles": batch.loss_roles,
        "spans": batch.spans,
        "one_pass": one_pass,
    }
