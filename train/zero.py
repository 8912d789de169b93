"""The same under DeepSpeed, which averages, clips and steps by itself and keeps the moments in a form of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lragent.errors import LRAgentError
from lragent.train.batches import PackedBatch
from lragent.train.data import NO_TARGET
from lragent.train.distributed import MOMENTS, Strategy, is_zero3
from lragent.train.role_loss import RoleLoss, loss_inputs


class ZeroStrategy(Strategy):
    """The model and optimizer of one phase of a run under ZeRO-1, -2 or -3, offloaded or not."""

    def _before_prepare(self, loss: RoleLoss) -> None:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1  # a batch is one row; what it holds is ours to say
        config["gradient_accumulation_steps"] = 1  # `last` says where a step ends
        config["gradient_clipping"] = self.clip or 0.0
        config.setdefault("zero_force_ds_cpu_optimizer", False)  # the adapters are small, and its own needs a compiler
        # Gradients are collected in a buffer of this many numbers, by default 2 GB of them.
        config["zero_optimization"].setdefault("reduce_bucket_size", sum(map(_numbers, self._learning())))
        if is_zero3(self.accelerator):
            from deepspeed.utils import set_z3_leaf_modules

            # An adapter's matrices are read by attention, after its projection has run: whole layers are gathered.
            classes = self._layer_classes()
            set_z3_leaf_modules(loss, list(classes))
            for module in self.built.model.modules():
                if type(module) in classes:
                    keep_no_inputs(module)
            # A leaf's gradients are taken when that of its input is there, and the first layer's would need none.
            self.built.model.get_base_model().enable_input_require_grads()

    def backward(self, value: Tensor, *, last: bool) -> None:
        """See Strategy."""
        self.loss.set_gradient_accumulation_boundary(is_boundary=last)
        self.loss.backward(value * self.accelerator.num_processes)

    def step(self) -> float:
        """See Strategy; here a step is taken whatever the norm is."""
        self.loss.step()
        norm = self.loss.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def load(self, state: Mapping[str, Tensor], steps: int | None) -> None:
        """See Strategy."""
        if steps:
            self._make_moments()
        super().load(state, steps)
        if steps:
            for own in self.loss.optimizer.optimizer.state.values():
                own["step"] = torch.full_like(own["step"], steps) if torch.is_tensor(own["step"]) else steps

    def _make_moments(self) -> None:
        """Let DeepSpeed make the optimizer's numbers, which it does in its first step: one at a rate of zero."""
        if self.loss.optimizer.optimizer.state:
            return
        self.set_rate(0.0)
        self.backward(0.0 * self.loss(**_anything(self.accelerator.device)).sum(), last=True)
        self.loss.step()

    def _whole(self, parameter: Tensor) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return _had(safe_get_full_fp32_param(parameter))
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.loss.optimizer.optimizer.state:
            return torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
        return _had(safe_get_full_optimizer_state(parameter, moment))

    def _set_whole(self, parameter: Tensor, value: Tensor) -> None:
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param

        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(self.accelerator.device))
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    def _set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor], steps: int) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[moment].to(self.accelerator.device), moment)


class _FrozenLinear(torch.autograd.Function):
    """`x W^T`, of which only W is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0].matmul(weight), None, None


def keep_no_inputs(layer: nn.Module) -> None:
    """Let the frozen linears of a layer, which is gathered as a whole, keep no inputs, in place.

    DeepSpeed keeps them, for gradients of weights that here have none: 12 GiB for 8,192 tokens of Llama-3.1-8B. torch
    does not, but keeps views of the gathered weights, and so the whole base.
    """
    for module in layer.modules():
        if type(module) is nn.Linear and not any(parameter.requires_grad for parameter in module.parameters()):
            module.forward = partial(_frozen, module)  # type: ignore[method-assign]


def _frozen(module: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _FrozenLinear.apply(x, module.weight, module.bias)
    return out


def _numbers(parameter: Tensor) -> int:
    """How many the whole parameter has."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _anything(device: torch.device) -> dict[str, Any]:
    """Two tokens of the first role, as the arguments of `RoleLoss`."""
    batch = PackedBatch(
        input_ids=torch.zeros(2, dtype=torch.long),
        position_ids=torch.arange(2),
        spans=[(0, 2)],
        roles=torch.ones(2, dtype=torch.long),
        targets=torch.tensor([0, NO_TARGET]),
        loss_roles=torch.tensor([1, 0]),
        sources=("",),
    )
    return loss_inputs(batch.to(device), one_pass=False)


def _had(value: Tensor | None) -> Tensor:
    if value is None:
        raise LRAgentError("DeepSpeed gave no whole matrix: its version and this one do not fit together.")
    return value
