"""A decoder layer in few launches, for every model whose layers have the usual form.

transformers' models are not changed: where a layer's parts are those of Llama and its likes (a norm, attention, a norm,
a gated MLP, each added to the residual stream), a `FusedLayer` over the same weights stands in for it. What a layer
hands to attention (scale, window, soft cap) is asked of the layer itself, and a stand-in is used only if it gives what
the layer gives (`serve.engine.fusing`). Layers of other forms run as transformers has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lragent.kernels.ops import gate, normalise, project
from lragent.key_norm import key_norm
from lragent.role_linear import RoleLinear
from lragent.rope import Rope
from lragent.routing import Router
from lragent.serve.engine.new_states import CachePass, NewStates
from lragent.serve.engine.stacked import StackedProjections, norm_of, plain_linear


@dataclass(frozen=True)
class AttentionFacts:
    """What a layer tells attention."""

    scale: float
    window: int | None
    softcap: float | None


class FusedLayer(nn.Module):
    """Stands in for `layer`, whose weights it shares and whose other attributes it passes on."""

    def __init__(self, layer: nn.Module, facts: AttentionFacts, router: Router) -> None:
        super().__init__()
        self.layer = layer
        self.facts = facts
        self.router = router
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        self.head_dim = int(attention.head_dim)  # type: ignore[arg-type]  # a number, as `reason_against` has seen
        self.index = int(attention.layer_idx)  # type: ignore[arg-type]  # as above
        self.outputs = attention.get_submodule("o_proj"), mlp.get_submodule("down_proj")  # a tuple: they have a place
        self.projections = StackedProjections([getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")], 1)
        self.gate_up = StackedProjections([mlp.get_submodule("gate_proj"), mlp.get_submodule("up_proj")], 2)
        self.input_norm = norm_of(layer.get_submodule("input_layernorm"))
        self.mlp_norm = norm_of(layer.get_submodule("post_attention_layernorm"))
        self.key_norm = key_norm(attention)
        query_norm = getattr(attention, "q_norm", None)
        self.head_norms = None if self.key_norm is None else (norm_of(query_norm), norm_of(self.key_norm))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: Rope,
        attention_pass: CachePass,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states: [1, T, d], may be added to in place; position_embeddings: cos and sin, [1, T, D] each."""
        x = hidden_states[0]
        x = self._add(self.outputs[0], self._attended(x, position_embeddings, attention_pass), x)
        x = self._add(self.outputs[1], self._gated(x), x)
        return x.unsqueeze(0)

    def _attended(self, x: torch.Tensor, angles: Rope, through: CachePass) -> torch.Tensor:
        """[T, Hq * D]."""
        product = self.projections.product(x, self.input_norm, through.base_from)
        modules = self.projections.modules
        low_k, low_v = (self.projections.low(product, module) for module in modules[1:])
        split_k, split_v = (
            low is not None and self._split(module) for low, module in ((low_k, modules[1]), (low_v, modules[2]))
        )
        adapt = (True, not split_k, not split_v)
        query, key, value = (
            self._heads(self._output(self.projections, product, at, whole)) for at, whole in enumerate(adapt)
        )
        if self.head_norms is not None:
            query = normalise(query, *self.head_norms[0])
            key = key if split_k else normalise(key, *self.head_norms[1])
        new = NewStates(
            query,
            key,
            value,
            low_v if split_v else None,
            _up(modules[2]) if split_v else None,
            low_k if split_k else None,
            _up(modules[1]) if split_k else None,
            (angles[0][0], angles[1][0]),
            self.key_norm if split_k else None,
        )
        facts = self.facts
        return through.through_cache(self.index, new, facts.scale, facts.window, facts.softcap).flatten(1)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d_inner]: SiLU of the gate times the rest."""
        stack = self.gate_up
        if not stack.low_spans:
            return project(x, stack.weight, bias=stack.bias, norm=self.mlp_norm, gated=True)
        product = stack.product(x, self.mlp_norm)
        for at in range(2):
            self._output(stack, product, at, True)
        return gate(product, stack.spans[0][1])

    def _output(self, stack: StackedProjections, product: torch.Tensor, at: int, adapt: bool) -> torch.Tensor:
        """[T, d_out] of one projection, a part of `product`, to which its role's part is added if `adapt`."""
        start, end = stack.spans[at]
        module, out = stack.modules[at], product[:, start:end]
        low = stack.low(product, module)
        if low is None or not adapt:
            return out
        assert isinstance(module, RoleLinear)
        return module.add_up(out, low)

    def _add(self, module: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + module(x)`."""
        linear = plain_linear(module)
        if linear is None:
            return residual + module(x.unsqueeze(0))[0]
        residual = project(x, linear.weight, bias=linear.bias, residual=residual)
        if isinstance(module, RoleLinear) and self.router.route.uniform != 0:
            residual = module.add_up(residual, project(x, module.down))
        return residual

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """[T, H * D] to [T, H, D]."""
        return states.unflatten(1, (-1, self.head_dim))

    def _split(self, module: nn.Module) -> bool:
        """Whether attention applies this projection's `B`."""
        return isinstance(module, RoleLinear) and module.kind in self.router.route.split


def _up(module: nn.Module) -> torch.Tensor:
    assert isinstance(module, RoleLinear)
    return module.up
