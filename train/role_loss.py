"""The losses of a flat batch under its roles.

`shared` trains as `base_lr_shared` serves: every position is processed once, by one role, and read by all, each reader
through its own `B`. `per_role` trains as `non_shared` serves: each role alone over its context, every position its own
(LRAgent, arXiv 2602.01053, trains so).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
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


class RoleLoss(nn.Module):
    """The losses of a flat batch under its roles. A module, so that accelerate can wrap it for several processes."""

    def __init__(self, built: RoleModel, *, recompute: bool = False) -> None:
        """recompute: keep what goes into each layer only, and compute the rest again in the backward pass."""
        super().__init__()
        self.model = built.model
        self._built = built
        base = built.model.get_base_model()
        decoder = base.get_decoder()
        self._decoder = next(path for path, module in base.named_modules() if module is decoder)
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
            outputs = base.get_decoder()(**inputs)
        logits_of = _after_decoder(base, self._decoder, type(outputs))
        states, wanted = outputs.last_hidden_state[0][counted], targets[counted]
        losses, likeliest = self._losses(logits_of, states, wanted, judge)
        onehot = loss_roles[counted] == torch.arange(len(self._built.roles) + 1, device=losses.device).unsqueeze(-1)
        sums: torch.Tensor = onehot.to(losses.dtype) @ losses  # not by index_add, whose order differs from run to run
        if not judge:
            return sums
        right = torch.ones_like(targets, dtype=torch.bool)
        right[counted] = likeliest == wanted
        return sums, right

    def _losses(
        self,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        states: torch.Tensor,
        targets: torch.Tensor,
        judge: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """states: [n, d]; targets: [n]. Returns losses [n] and, with `judge`, likeliest tokens [n], else none [0]."""

        def some(part: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = logits_of(part)
            likeliest = logits.detach().argmax(-1) if judge else wanted[:0]
            return _TokenLosses.apply(logits, wanted), likeliest

        base = self.model.get_base_model()
        rows = max(1, LOGITS_AT_ONCE.get(states.device.type, LOGITS_AT_ONCE["cpu"]) // base.config.vocab_size)
        number = _agreed(max(1, -(-len(targets) // rows)), base.get_output_embeddings())
        if number == 1:
            return some(states, targets)
        cuts = [slice(at * rows, (at + 1) * rows) for at in range(number)]
        pieces = [checkpoint(some, states[cut], targets[cut], use_reentrant=False) for cut in cuts]
        losses, likeliest = zip(*pieces, strict=True)
        return torch.cat(losses), torch.cat(likeliest)


def _agreed(number: int, head: nn.Module) -> int:
    """In how many pieces the head runs: at least `number`, and in every process that gathers its weight, as many.

    Under ZeRO-3 each call of the head gathers the weight from all processes, which would wait for one another for ever
    if some had more pieces than others.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        return number
    most = torch.tensor(number, device=next(head.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _after_decoder(base: nn.Module, path: str, outputs: type[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a transformers model makes of its decoder's last states [n, d]: logits [n, vocabulary].

    path: the decoder's name in the model. outputs: the type of what it returns. The model's own `forward` runs, on a
    copy that shares all modules but the decoder, in whose place the states at hand are given: so models that cap or
    scale their logits do so here too, and the head is called as a module, as its weight may have to be gathered.
    """
    rest = at = _shallow(base)
    *parents, name = path.split(".")
    for parent in parents:
        copied = _shallow(at.get_submodule(parent))
        at._modules[parent] = copied
        at = copied
    at._modules[name] = _Given(outputs)

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        # Not called as a module: hooks that hang on the model as a whole are not to run for every piece.
        logits: torch.Tensor = type(base).forward(rest, inputs_embeds=states.unsqueeze(0), use_cache=False).logits[0]
        return logits

    return logits_of


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares everything, and whose parts can be exchanged."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


class _Given(nn.Module):
    """In the place of a decoder: its input is its last state."""

    def __init__(self, outputs: type[Any]) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        return self._outputs(last_hidden_state=inputs_embeds)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of every row of logits [n, vocabulary], in float32 [n], a few rows at a time.

    The gradient is worked out with the loss and kept in the dtype of the logits, so that no float32 copy of all logits
    is ever written: on a CPU such copies cost more than what they are for.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, FLOATS_AT_ONCE // logits.shape[1])
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, logits.shape[0], rows):
            part = logits[start : start + rows].to(torch.float32, copy=True)
            wanted = targets[start : start + rows].unsqueeze(-1)
            total = part.logsumexp(-1, keepdim=True)
            losses[start : start + rows] = (total - part.gather(-1, wanted)).squeeze(-1)
            if grad is not None:
                part.sub_(total).exp_().scatter_add_(-1, wanted, torch.full_like(total, -1.0))
                grad[start : start + rows] = part
        # As a saved tensor, so that checkpointing can let go of it: the gradients of all pieces are as large as all
        # logits.
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (own,) = ctx.saved_tensors
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
