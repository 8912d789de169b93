"""What the processes of a run agree on, in one process; `test_launch.py` runs the engines for real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tiny import tiny_model
from torch import nn

from lragent.attention import ATTENTION, register_attention
from lragent.errors import LRAgentError, UserError
from lragent.tied_lora import build_role_model
from lragent.train import distributed
from lragent.train.distributed import Strategy, check_engine, make_strategy, named_adapters
from lragent.train.role_loss import RoleLoss

ROLES = ("plan", "action")


def strategy(seed: int = 0) -> Strategy:
    register_attention()
    torch.manual_seed(seed)
    model = tiny_model()
    model.set_attn_implementation(ATTENTION)
    built = build_role_model(model, ROLES, rank=4, alpha=8)
    return make_strategy(Accelerator(cpu=True), built, RoleLoss(built), lr=1e-2, decay=0.0, clip=1.0)


def step(made: Strategy, seed: int) -> float:
    """A step along a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in named_adapters(made.built).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made.step()


def test_a_state_taken_over_goes_on_as_the_first_would() -> None:
    first, second = strategy(0), strategy(1)
    for seed in range(3):
        step(first, seed)
    second.load(first.state(), 3)
    assert step(first, 7) == step(second, 7)
    one, other = first.state(), second.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(name.startswith("exp_avg_sq:") for name in one) == len(named_adapters(first.built))


def test_weights_alone_begin_the_moments_anew() -> None:
    first, second = strategy(0), strategy(1)
    step(first, 0)
    second.load(first.weights(), None)
    assert all(torch.equal(value, second.weights()[name]) for name, value in first.weights().items())
    assert all(not value.any() for name, value in second.state().items() if name.startswith("exp_avg"))


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    made = strategy()
    before = made.weights()
    for parameter in named_adapters(made.built).values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert made.step() != made.step()
    assert all(torch.equal(value, before[name]) for name, value in made.weights().items())


def test_an_a_that_differs_between_roles_is_never_saved() -> None:
    made = strategy()
    module = next(iter(made.built.modules.values()))
    module.lora_A["action"] = nn.Linear(64, 4, bias=False)
    for get in (made.state, made.weights):
        with pytest.raises(LRAgentError, match="no longer tied"):
            get()


@pytest.mark.parametrize("zero_3", [False, True])
def test_zero_3_is_not_told_a_place_and_its_angles_are_whole(zero_3: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ZeRO-3 makes while it loads has the weights' dtype; a GPU to load to is refused by transformers."""
    places: list[str] = []

    def load(source: object, dtype: torch.dtype, device: object, *args: object, **options: object) -> nn.Module:
        places.append(str(device))
        model: nn.Module = tiny_model()
        rotary = model.get_decoder().rotary_emb
        rotary.inv_freq = rotary.inv_freq.bfloat16()
        return model

    monkeypatch.setattr(distributed, "load_model", load)
    monkeypatch.setattr(distributed, "is_deepspeed_zero3_enabled", lambda: zero_3)
    plugin = SimpleNamespace(dschf=SimpleNamespace(config={}))
    here: Any = SimpleNamespace(device=torch.device("meta"), state=SimpleNamespace(deepspeed_plugin=plugin))
    base: Any = distributed.load_base(here, None, torch.bfloat16)  # type: ignore[arg-type]
    assert places == ["cpu" if zero_3 else "meta"]
    assert base.get_decoder().rotary_emb.inv_freq.dtype == (torch.float32 if zero_3 else torch.bfloat16)
    assert base.get_decoder().rotary_emb.inv_freq.device.type == ("meta" if zero_3 else "cpu")
    assert plugin.dschf.config.get("bf16", {"enabled": False}) == {"enabled": False}, "adapters stay in float32"


def accelerator(kind: DistributedType, **more: Any) -> Any:
    plugin = SimpleNamespace(deepspeed_config=more.pop("config", {}), zero_stage=more.pop("stage", 2))
    plain: dict[str, Any] = {
        "distributed_type": kind, "mixed_precision": "no", "gradient_accumulation_steps": 1, "is_fsdp2": True,
        "state": SimpleNamespace(deepspeed_plugin=plugin),
    }  # fmt: skip
    return SimpleNamespace(**(plain | more))


@pytest.mark.parametrize(
    ("asked", "quantized", "says"),
    [
        (accelerator(DistributedType.MULTI_GPU, mixed_precision="bf16"), False, "`mixed_precision` is 'bf16'"),
        (accelerator(DistributedType.MULTI_GPU, gradient_accumulation_steps=4), False, "`batches_per_step` says it"),
        (accelerator(DistributedType.FSDP, is_fsdp2=False), False, "`fsdp_version` is 1"),
        (accelerator(DistributedType.FSDP), True, "does not go with FSDP2"),
        (accelerator(DistributedType.DEEPSPEED, config={"optimizer": {}}), False, "holds `optimizer`"),
        (accelerator(DistributedType.DEEPSPEED, stage=3), True, "does not go with ZeRO-3"),
        (accelerator(DistributedType.MEGATRON_LM), False, "MEGATRON_LM"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(asked: Any, quantized: bool, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_engine(asked, quantized=quantized)
