"""Fused layers give what the layers give that they stand in for, and stay out where they would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import ROLES, Recorder, drive, tiny_engine
from tiny import make_adapter_set, tiny_model
from tolerances import MODEL_TOLERANCES
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from lragent.attention import ATTENTION, register_attention
from lragent.modes import SharingMode
from lragent.role_linear import RoleLinear, install_roles
from lragent.routing import Router
from lragent.serve.engine import stacked
from lragent.serve.engine.fused_ends import FusedHead, FusedNorm
from lragent.serve.engine.fused_layer import FusedLayer
from lragent.serve.engine.fusing import fuse_layers, reason_against

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
USUAL = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}


def model_of(name: str, **options: Any) -> Any:
    register_attention()
    model = tiny_model(family=name.split()[0], **(USUAL.get(name, {}) | options))
    model.set_attn_implementation(ATTENTION)
    return model


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL, ("k_proj", "up_proj")], ids="+".join)
@pytest.mark.parametrize("name", USUAL)
def test_engines_with_and_without_fused_layers_agree(name: str, targets: tuple[str, ...]) -> None:
    options = {"family": name.split()[0], **USUAL[name]}
    adapters = make_adapter_set(tiny_model(**options), ROLES, targets=targets)
    runs = []
    for fused in (True, False):
        logits = [
            got
            for *_, got in drive(
                SharingMode.BASE_SHARED, adapters, steps=4, model_options=options, fused=fused, token_budget=9
            )
        ]
        runs.append(torch.cat(logits))
    torch.testing.assert_close(*runs, **MODEL_TOLERANCES[torch.float32])


@pytest.mark.parametrize("name", USUAL)
def test_every_usual_layer_is_fused_and_no_weight_is_held_twice(name: str) -> None:
    model = model_of(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    router = Router()
    install_roles(model, make_adapter_set(model, ROLES, targets=ALL), router)
    assert fuse_layers(model, router, frozenset({"v_proj"})) == 2
    layers = model.get_decoder().layers
    assert all(isinstance(layer, FusedLayer) for layer in layers)
    assert isinstance(model.get_decoder().norm, FusedNorm)
    assert isinstance(model.get_output_embeddings(), FusedHead)
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    for layer in layers:
        weight = layer.projections.weight
        inside = range(weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size())
        for kind in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.self_attn, kind)
            assert projection.base_layer.weight.data_ptr() in inside
            assert projection.down.data_ptr() in inside


def test_layers_of_other_forms_run_as_they_are() -> None:
    model = model_of("gemma2")
    assert "post_feedforward_layernorm" in str(reason_against(model.get_decoder().layers[0]))
    assert fuse_layers(model, Router(), frozenset()) == 0
    quantised = model_of("llama")
    attention = quantised.get_decoder().layers[1].self_attn
    attention.k_proj = nn.Sequential(attention.k_proj)  # as little a plain matrix as a quantised one
    assert "quantised" in str(reason_against(quantised.get_decoder().layers[1]))
    router = Router()
    assert fuse_layers(quantised, router, frozenset()) == 1


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
def test_a_layer_that_computes_something_else_is_not_replaced(part: str) -> None:
    """All parts have their usual names and kinds; one of them does more than its kind does."""
    model = model_of("llama")
    changed = model.get_decoder().layers[0].get_submodule(part)
    forward = changed.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (1.01 * out[0], *out[1:]) if isinstance(out, tuple) else 1.01 * out

    changed.forward = other
    assert fuse_layers(model, Router(), frozenset()) == 1
    assert not isinstance(model.get_decoder().layers[0], FusedLayer)


def test_an_lr_prefill_projects_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tiny_engine("base_shared", token_budget=64))
    recorder.ask("plan", list(range(20, 60)), 1)
    multiplied: list[tuple[int, int]] = []
    project = stacked.project

    def watched(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        multiplied.append((len(x), len(weight)))
        return project(x, weight, **options)

    monkeypatch.setattr(stacked, "project", watched)
    answer = recorder.ask("action", [*range(20, 60), 7], 1)
    assert answer.usage is not None
    assert answer.usage.lr_prefilled == 40
    kv = 2 * 2 * 16  # keys and values of two heads
    assert sorted({rows for _, rows in multiplied})[0] == kv, "keys and values have a product of their own"
    assert [tokens for tokens, rows in multiplied if rows == kv] == [1, 1], "in both layers of the new token alone"


def test_a_layer_that_its_stand_in_cannot_compute_is_left_alone() -> None:
    """Angles for half of each head: transformers' layer would be given them by a model of another kind."""
    model = model_of("llama")
    layer = model.get_decoder().layers[0]
    rotate = layer.self_attn.forward

    def of_half(hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        widened = tuple(torch.cat([angles, angles], dim=-1) for angles in position_embeddings)
        return rotate(hidden_states, position_embeddings=widened, **kwargs)

    layer.self_attn.forward = of_half
    rotary = model.get_decoder().rotary_emb
    whole = rotary.forward
    rotary.forward = lambda *args, **kwargs: tuple(angles[..., :8] for angles in whole(*args, **kwargs))
    model.get_decoder().layers[1].self_attn.forward = layer.self_attn.forward
    assert fuse_layers(model, Router(), frozenset()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_roles_that_change_little_are_proven_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that forgets an adapter is noticed, though its `B` be as good as zero, as an untrained one's is."""
    model = model_of("llama").to(dtype)
    router = Router()
    install_roles(model, make_adapter_set(model, ROLES, targets=("q_proj",)), router)
    quiet = [module for module in model.modules() if isinstance(module, RoleLinear)]
    for module in quiet:
        module.up *= 1e-4
    before = [module.up.clone() for module in quiet]
    output = FusedLayer._output
    monkeypatch.setattr(FusedLayer, "_output", lambda *given: output(*given[:-1], False))
    assert fuse_layers(model, router, frozenset()) == 0
    monkeypatch.undo()
    assert fuse_layers(model, router, frozenset()) == 2
    assert all(torch.equal(module.up, up) for module, up in zip(quiet, before, strict=True))


def test_attention_that_asks_for_more_is_left_alone() -> None:
    """As that of Ministral 3, which scales queries by their position, though not at the positions of short prompts."""
    model = model_of("llama")
    layer = model.get_decoder().layers[0]

    class Scaled(type(layer.self_attn)):  # type: ignore[misc]  # the class is only known now
        def forward(self, hidden_states: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs)

    layer.self_attn.__class__ = Scaled
    assert "position_ids" in str(reason_against(layer))


def test_a_model_of_another_build_runs_as_it_is() -> None:
    """Phi's decoder has no `norm`, and its layers have other parts."""
    config = PhiConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    assert fuse_layers(PhiForCausalLM(config).eval(), Router(), frozenset()) == 0
