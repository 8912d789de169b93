"""How the processes of a run share its work: accelerate's DDP and FSDP2, or DeepSpeed's ZeRO.

The base is frozen, and the adapters are small. What differs between the engines is where a whole matrix can be had, how
gradients meet and how a step is taken; this file is where that is known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from lragent.attention import ATTENTION
from lragent.errors import LRAgentError, UserError
from lragent.models import ModelSource, load_model
from lragent.tied_lora import RoleModel
from lragent.train.role_loss import RoleLoss

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by torch's and DeepSpeed's names for them."""


def named_adapters(built: RoleModel) -> dict[str, nn.Parameter]:
    """Every A once, and every B, by module path and role."""
    named: dict[str, nn.Parameter] = {}
    for path, module in built.modules.items():
        named[f"{path}.shared_A"] = module.shared_a
        named |= {f"{path}.role_B.{role}": b for role, b in zip(built.roles, module.role_b, strict=True)}
    return named


def matrices(built: RoleModel, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shared A [r, d_in] and role B [n_roles, d_out, r] by module path, from whole weights under their names."""
    shared_a = {path: weights[f"{path}.shared_A"] for path in built.modules}
    role_b = {path: torch.stack([weights[f"{path}.role_B.{role}"] for role in built.roles]) for path in built.modules}
    return shared_a, role_b


def make_accelerator() -> Accelerator:
    """Accelerate's view of the processes, as its launcher and config ask for it.

    On a CPU accelerate knows DDP only: there, what it leaves out is filled in, so that every config can be tried.
    """
    if torch.cuda.is_available():
        return Accelerator()
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        state = PartialState()
        state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
        state.local_process_index = int(os.environ["LOCAL_RANK"])
        return Accelerator()
    accelerator = Accelerator(cpu=True)
    if _asked("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # The one is copied from the other whenever accelerate looks at it.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def engine_name(accelerator: Accelerator) -> str:
    """What shares the work out, for people."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "one process" if accelerator.num_processes == 1 else "DDP"


def load_base(
    accelerator: Accelerator, source: ModelSource, dtype: torch.dtype, quantize: Literal["nf4"] | None = None
) -> nn.Module:
    """The frozen base, on this process's device; where ZeRO-3 loads it, this process's share of every weight.

    Raises UserError as `load_model` does.
    """
    if not is_deepspeed_zero3_enabled():
        return load_model(source, dtype, accelerator.device, ATTENTION, quantize=quantize)
    with _sharded_in(accelerator, dtype):
        # DeepSpeed puts every share on its GPU by itself, and transformers refuses to be told where.
        base = load_model(source, dtype, "cpu", ATTENTION)
    _renew_rotary(base, accelerator.device)
    return base


@contextmanager
def _sharded_in(accelerator: Accelerator, dtype: torch.dtype) -> Iterator[None]:
    """ZeRO-3 shards weights as they are loaded, in the dtype that its config names.

    That dtype must not stand there later: the adapters would be cast to it.
    """
    config = accelerator.state.deepspeed_plugin.dschf.config
    if dtype is not torch.bfloat16:
        yield
        return
    before = config.get("bf16")
    config["bf16"] = {"enabled": True}
    try:
        yield
    finally:
        config["bf16"] = before or {"enabled": False}


def _renew_rotary(base: nn.Module, device: torch.device) -> None:
    """Make the rotary embeddings of a transformers model anew, in float32.

    Whatever is made while ZeRO-3 loads gets the dtype of the weights, and transformers 5.17 leaves it so: with
    frequencies in bfloat16, angles are off by whole turns after some hundred positions.
    """
    for path, module in list(base.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            base.set_submodule(path, type(module)(module.config).to(device))


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the base."""
    return bool(
        accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3
    )


def check_engine(accelerator: Accelerator, *, quantized: bool, svd: bool = False) -> None:
    """Refuse what accelerate's config may ask for and a run cannot do. Raises UserError naming the setting."""
    state = accelerator.state
    if accelerator.mixed_precision != "no":
        raise UserError(
            f'accelerate\'s `mixed_precision` is {accelerator.mixed_precision!r}; set it to "no": `dtype` says how the '
            "base is kept, and adapters are always trained in float32."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("accelerate's `gradient_accumulation_steps` must be 1: `batches_per_step` says it.")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "accelerate's `fsdp_version` is 1, which cannot shard frozen and trained weights together; set 2."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = state.deepspeed_plugin.deepspeed_config
        for part in ("optimizer", "scheduler"):
            if part in config:
                raise UserError(f"the DeepSpeed config holds `{part}`; take it out: the roles config says it.")
        if quantized and is_zero3(accelerator):
            raise UserError("`quantize` does not go with ZeRO-3, which cannot shard 4-bit weights; take ZeRO-2 or DDP.")
        if svd and is_zero3(accelerator):
            raise UserError(
                "`a_init: svd` does not go with ZeRO-3, where no process has a whole weight; take `random`."
            )
    if quantized and accelerator.distributed_type == DistributedType.FSDP:
        raise UserError("`quantize` does not go with FSDP2 here; take DDP or ZeRO-2.")
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP,
                 DistributedType.DEEPSPEED)  # fmt: skip
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"accelerate's `distributed_type` is {accelerator.distributed_type.value}; take MULTI_GPU, FSDP, DEEPSPEED "
            "or NO."
        )


class Strategy:
    """The model and optimizer of one phase of a run, shared among its processes by DDP or FSDP2, or in one process."""

    def __init__(
        self,
        accelerator: Accelerator,
        built: RoleModel,
        loss: RoleLoss,
        *,
        lr: float,
        decay: float,
        clip: float | None,
    ) -> None:
        """Every parameter of `built` that learns gets an optimizer; which ones may not change later.

        clip: the longest gradient, None = as it comes.
        """
        self.accelerator, self.built, self.clip = accelerator, built, clip
        self.learning = [name for name, p in named_adapters(built).items() if p.requires_grad]
        optimizer = torch.optim.AdamW(self._learning(), lr=lr, weight_decay=decay)
        self._before_prepare(loss)
        self.loss, self.optimizer = accelerator.prepare(loss, optimizer)

    def _learning(self) -> list[nn.Parameter]:
        named = named_adapters(self.built)
        return [named[name] for name in self.learning]

    def _layer_classes(self) -> set[type[nn.Module]]:
        """The classes of the decoder layers that hold adapters: what is gathered at once."""
        base = self.built.model.get_base_model()
        found = set()
        for path in self.built.modules:
            parts = path.split(".")
            at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
            if at is None:
                raise LRAgentError(f"{path}: lies in no numbered layer.")
            found.add(type(base.get_submodule(".".join(parts[: at + 1]))))
        return found

    def _before_prepare(self, loss: RoleLoss) -> None:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = sorted(cls.__name__ for cls in self._layer_classes())

    def backward(self, value: Tensor, *, last: bool) -> None:
        """Add the gradient of `value`, over all processes its sum. last: of the step."""
        del last  # `no_sync` has said it
        # Gradients are averaged over the processes, hence the factor.
        self.accelerator.backward(value * self.accelerator.num_processes)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the coming step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> float:
        """Shorten the gradient and take the step; returns its norm before. None is taken where that is not finite."""
        norm = self.accelerator.clip_grad_norm_(self._learning(), math.inf if self.clip is None else self.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if math.isfinite(value := float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    # -- whole matrices ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All adapters and the optimizer's moments, whole, in float32 on the CPU. Every process must call it.

        Keys are those of `named_adapters`, and `exp_avg:`, `exp_avg_sq:` before those of what learns.
        """
        named = named_adapters(self.built)
        state = {name: _to_cpu(self._whole(parameter)) for name, parameter in named.items()}
        for name in self.learning:
            for moment in MOMENTS:
                state[f"{moment}:{name}"] = _to_cpu(self._moment(named[name], moment))
        self._check_same(state)
        return state

    def weights(self) -> dict[str, Tensor]:
        """The adapters alone. Every process must call it."""
        weights = {name: _to_cpu(self._whole(parameter)) for name, parameter in named_adapters(self.built).items()}
        self._check_same(weights)
        return weights

    def load(self, state: Mapping[str, Tensor], steps: int | None) -> None:
        """Take over what `state` or, with steps None, `weights` gave, on any number of processes. steps: taken so far.

        Raises KeyError where something is missing.
        """
        named = named_adapters(self.built)
        with torch.no_grad():
            for name, parameter in named.items():
                self._set_whole(parameter, state[name])
            if steps is not None:
                for name in self.learning:
                    self._set_moments(named[name], {moment: state[f"{moment}:{name}"] for moment in MOMENTS}, steps)

    def _whole(self, parameter: Tensor) -> Tensor:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        states = self.optimizer.optimizer.state
        if parameter not in states:  # no step has been taken
            return torch.zeros(parameter.shape)
        return self._whole(states[parameter][moment])

    def _set_whole(self, parameter: Tensor, value: Tensor) -> None:
        parameter.copy_(_like(parameter, value))

    def _set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor], steps: int) -> None:
        if steps:
            own = {moment: _like(parameter, value) for moment, value in moments.items()}
            self.optimizer.optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **own}

    def _check_same(self, state: Mapping[str, Tensor]) -> None:
        """Raise LRAgentError where the processes hold different adapters, or A is no longer tied."""
        self.built.check_tied()
        if self.accelerator.num_processes == 1:
            return
        sums = torch.stack([value.view(torch.int32).to(torch.int64).sum() for value in state.values()])
        least = sums.to(self.accelerator.device)
        most = least.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise LRAgentError("the processes of the run hold different adapters; nothing was saved.")


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, whole, as `parameter` is kept: on its device, and sharded as it is."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def make_strategy(
    accelerator: Accelerator, built: RoleModel, loss: RoleLoss, *, lr: float, decay: float, clip: float | None
) -> Strategy:
    """The strategy for accelerate's engine."""
    kind: type[Strategy] = Strategy
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from lragent.train.zero import ZeroStrategy as kind  # noqa: N813 - DeepSpeed is slow to import
    return kind(accelerator, built, loss, lr=lr, decay=decay, clip=clip)
