"""Puts fused layers into a model, each proven against the layer that it stands in for."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lragent.errors import LRAgentError
from lragent.kernels.low_rank import role_up
from lragent.key_norm import key_norm, norm_eps
from lragent.role_linear import RoleLinear
from lragent.rope import rope_at, rotate
from lragent.routing import Route, Router
from lragent.serve.engine.fused_ends import FusedHead, FusedNorm
from lragent.serve.engine.fused_layer import AttentionFacts, FusedLayer
from lragent.serve.engine.new_states import CachePass, NewStates
from lragent.serve.engine.stacked import plain_linear

logger = logging.getLogger(__name__)

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""What a layer must consist of, and of nothing else."""
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a stand-in's output may be from its layer's, relative to what the layer adds to its input."""
KNOWN = {"self", "hidden_states", "position_embeddings", "attention_mask", "cache", "past_key_values", "cache_position"}
"""What attention layers of the usual form are given by name. One that asks for more does more, perhaps where nobody
tries it."""


@torch.inference_mode()
def fuse_layers(model: PreTrainedModel, router: Router, split: frozenset[str]) -> int:
    """Let fused layers stand in for a model's own where they can, and for its last norm and its head. Returns how many.

    split: the projections whose low-rank part attention applies. The model's attention must be `ATTENTION`.
    """
    decoder = model.get_decoder()
    norm, layers = getattr(decoder, "norm", None), getattr(decoder, "layers", None)
    if norm is not None and norm_eps(norm) is not None:
        decoder.norm = FusedNorm(norm)
    head = model.get_output_embeddings()
    if plain_linear(head) is head and head is not None:
        model.set_output_embeddings(FusedHead(head))
    if layers is None:
        return 0
    fused, reasons = 0, set()
    for at, layer in enumerate(layers):
        reason = reason_against(layer)
        if reason is None:
            reason = _replace(model, layers, at, router, split)
        if reason is None:
            fused += 1
        else:
            reasons.add(reason)
    if reasons:
        logger.info("%d of %d layers run as transformers has them: %s", len(layers) - fused, len(layers), reasons)
    return fused


def reason_against(layer: nn.Module) -> str | None:
    """Why a layer cannot be fused, or None."""
    parts = dict(layer.named_children())
    if set(parts) != PARTS:
        return f"it consists of {', '.join(parts)}"
    attention, mlp = parts["self_attn"], parts["mlp"]
    heads = {name for name, _ in attention.named_children()} - {"q_norm", "k_norm"}
    if heads != ATTENTION_PARTS or not hasattr(attention, "head_dim") or not hasattr(attention, "layer_idx"):
        return f"its attention consists of {', '.join(sorted(heads))}"
    asked = set(inspect.signature(type(attention).forward).parameters) - KNOWN - {"kwargs"}
    if asked:
        return f"its attention asks for {', '.join(sorted(asked))}"
    if not {"gate_proj", "up_proj", "down_proj"} <= {name for name, _ in mlp.named_children()}:
        return "its MLP is not gated"
    stacked = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    stacked += [mlp.get_submodule("gate_proj"), mlp.get_submodule("up_proj")]
    linears = [plain_linear(module) for module in stacked]
    if any(linear is None or linear.weight.dtype != linears[0].weight.dtype for linear in linears):  # type: ignore[union-attr]  # None is met first
        return "its weights are quantised"
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    if key_norm(attention) is not None:
        norms += [attention.get_submodule("k_norm"), attention.get_submodule("q_norm")]
    for norm in norms:
        if norm_eps(norm) is None:
            return f"its norms are of the kind {type(norm).__name__}"
    return None


def _replace(model: PreTrainedModel, layers: Any, at: int, router: Router, split: frozenset[str]) -> str | None:
    """Replace one layer if its stand-in gives the same. Returns why not, or None.

    Both are tried on tokens of every role at the beginning, in the middle and at the end of the model's contexts.
    """
    layer = layers[at]
    weight = next(layer.parameters())
    config = model.config.get_text_config()
    tried = max(3, 1 + _roles_of(layer))
    last = int(config.max_position_embeddings) - 1
    positions = torch.linspace(0, last, tried, device=weight.device).long()
    route = Route.of(list(range(1 + _roles_of(layer))) + [0] * (tried - 1 - _roles_of(layer)), weight.device, split)
    generator = torch.Generator().manual_seed(at)
    hidden = torch.randn(1, tried, config.hidden_size, generator=generator).to(weight.device, weight.dtype)
    angles = rope_at(model, positions, weight.dtype)
    given: dict[str, Any] = {
        "position_embeddings": (angles[0][None], angles[1][None]),
        "position_ids": positions[None],
        "attention_mask": None,
    }
    with router.use(route), _loud_roles(layer):
        told = _ToldPass(route)
        try:
            expected = layer(hidden.clone(), attention_pass=told, **given)
        except (RuntimeError, ValueError, TypeError, AttributeError, LRAgentError) as error:
            return f"it cannot be tried alone: {error}"
        expected = expected[0] if isinstance(expected, tuple) else expected
        if told.facts is None:
            return "it does not call attention"
        fused = FusedLayer(layer, told.facts, router)
        try:
            got = fused(hidden.clone(), attention_pass=_ToldPass(route), **given)
        except (RuntimeError, ValueError, TypeError) as error:  # such as angles for a part of each head
            return f"its stand-in fails: {error}"
    errors = (got - expected).float().norm(dim=-1) / (expected - hidden).float().norm(dim=-1)
    if not (errors <= AGREEMENT[weight.dtype]).all():
        return f"its stand-in differs by {float(errors.max()):.1e}"
    layers[at] = fused
    return None


def _roles_of(layer: nn.Module) -> int:
    return max((len(module.up) for module in layer.modules() if isinstance(module, RoleLinear)), default=0)


@contextmanager
def _loud_roles(layer: nn.Module) -> Iterator[None]:
    """Give the roles random `B`s that change as much as the base does: a quiet one's absence would not be noticed."""
    quiet = {module: module.up for module in layer.modules() if isinstance(module, RoleLinear)}
    for module, up in quiet.items():
        base = plain_linear(module)
        size = 1.0 if base is None else float(base.weight.float().norm()) / up.shape[2] ** 0.5
        loud = torch.randn(up.shape, generator=torch.Generator().manual_seed(up.shape[2]))
        module.up = (loud * size / float(module.down.float().norm() + 1e-6)).to(up.device, up.dtype)
    try:
        yield
    finally:
        for module, up in quiet.items():
            module.up = up


class _ToldPass(CachePass):
    """Notes what a layer tells attention, and answers with something that depends on all of it.

    Every token sees itself alone, and its keys are added to what it would read.
    """

    base_from = 0

    def __init__(self, route: Route) -> None:
        self.route = route
        self.facts: AttentionFacts | None = None

    def through_cache(
        self, index: int, new: NewStates, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """See CachePass."""
        self.facts = AttentionFacts(scale, window, softcap)
        query, key, value = (states.transpose(0, 1) for states in (new.query, new.key, new.value))
        if new.rope is not None:
            query = rotate(query, new.rope)
            key = key if new.norm is not None else rotate(key, new.rope)
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))
        for states, low, up in ((key, new.low_k, new.up_k), (value, new.low_v, new.up_v)):
            if low is not None and up is not None:
                value = value + role_up(low, up, self.route.roles).view_as(states)
        group = query.shape[1] // key.shape[1]
        return query + (key + value).repeat_interleave(group, dim=1)
