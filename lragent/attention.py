"""Attention dispatch: transformers' models call the pass that the caller hands to `model(...)`.

transformers' `AttentionInterface` gives an attention function its layer, the projected (and rotated) query, key and
value, and every unknown keyword argument of `model(...)`. One function is registered, under `ATTENTION`; it hands the
tensors to the `AttentionPass` given as `attention_pass=`. So the models stay unmodified, and what differs between
training and serving is one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AttentionInterface

from lragent.errors import LRAgentError
from lragent.kernels.attention import lora_attention
from lragent.kernels.checks import MOST_DIMS, MOST_RANK
from lragent.kernels.low_rank import role_up
from lragent.kernels.packed import PackedLayout, packed_attention
from lragent.kernels.varlen_layout import VarlenLayout
from lragent.key_norm import key_norm
from lragent.rope import Rope, rotate
from lragent.routing import Route

ATTENTION = "lragent"
"""The name to load a model with: `attn_implementation=ATTENTION`, after `register_attention()`."""


class AttentionPass(Protocol):
    """One forward pass over a flat batch of T tokens, seen from its attention layers."""

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """query: [Hq, T, D] rotated; key: [Hkv, T, D] rotated; value: [Hkv, T, D]. Returns [T, Hq, D].

        window: a query sees itself and the `window - 1` tokens before it. softcap: scores become
        `softcap * tanh(score / softcap)`.
        """
        ...


class SplitProjection(Protocol):
    """A projection that can leave its low-rank part to attention (`RoleLinear`, and its counterpart in training)."""

    def take_low(self) -> torch.Tensor:
        """The low-rank activation [1, T, r] of the forward pass now running; it can be taken once."""
        ...

    def take_base(self) -> torch.Tensor:
        """The base output [1, T, d_out] of a `k_proj` whose keys are normalised afterwards; it can be taken once."""
        ...

    def reader_up(self) -> torch.Tensor:
        """[n_roles, r, d_out]: `B` of every role, transposed, scaling folded in."""
        ...


def split_projection(layer: nn.Module, kind: str, route: Route) -> SplitProjection | None:
    """The projection `kind` of an attention layer, where the route splits it; None too where it has no adapter."""
    projection = getattr(layer, kind, None)
    return cast(SplitProjection, projection) if kind in route.split and hasattr(projection, "take_low") else None


def split_keys(layer: nn.Module, k_proj: SplitProjection, key: torch.Tensor) -> tuple[torch.Tensor, nn.Module | None]:
    """What of a split `k_proj`'s keys is the same for all readers, and the norm that each applies before rotating.

    key: [Hkv, T, D], the base keys as the model made them. Where it normalises keys, they are given raw.
    """
    norm = key_norm(layer)
    if norm is None:
        return key, None
    kv_heads, tokens, dim = key.shape
    return k_proj.take_base()[0].view(tokens, kv_heads, dim).transpose(0, 1), norm


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. May be called again."""
    AttentionInterface.register(ATTENTION, _attention_function)


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attention_pass: AttentionPass | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' calling convention: tensors are [1, H, T, D], the result is [1, T, Hq, D]."""
    if attention_pass is None:
        raise LRAgentError("The model was called without `attention_pass=`.")
    out = attention_pass.attend(module, query[0], key[0], value[0], scaling, sliding_window, softcap)
    return out.unsqueeze(0), None


@dataclass(frozen=True)
class LayerStates:
    """What the T tokens of a pass leave at one layer for attention to read: what a cache would hold of them."""

    key: torch.Tensor
    """[Hkv, T, D], rotated; where `k_proj` is split the base keys, raw if the model normalises keys."""
    value: torch.Tensor
    """[Hkv, T, D]; where `v_proj` is split, `V_base`."""
    low_k: torch.Tensor | None
    """[T, r], not rotated, where `k_proj` is split."""
    low_v: torch.Tensor | None
    """[T, r] where `v_proj` is split."""


@dataclass(frozen=True)
class PackedPass:
    """A pass over whole trajectories laid end to end, without a cache: training, and the reference of serving.

    spans: half-open token ranges, one per trajectory; nothing is read across them. Where the route splits a projection,
    each query reads values (keys) through its own role's `B`. rope: needed where `k_proj` is split.
    """

    spans: tuple[tuple[int, int], ...]
    route: Route
    rope: Rope | None = None

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See AttentionPass."""
        v_proj, k_proj = split_projection(layer, "v_proj", self.route), split_projection(layer, "k_proj", self.route)
        low_v, up_v = (v_proj.take_low()[0], v_proj.reader_up()) if v_proj else (None, None)
        if k_proj is None:
            states = self.read(layer, LayerStates(key, value, None, low_v))
            return self._packed(query, states.key, states.value, states.low_v, up_v, scale, window, softcap)
        assert self.rope is not None, "a split k_proj needs the rotary embedding"
        low_k, up_k, (cos, sin) = k_proj.take_low()[0], k_proj.reader_up(), self.rope
        key, norm = split_keys(layer, k_proj, key)
        states = self.read(layer, LayerStates(key, value, low_k, low_v))
        assert states.low_k is not None
        key, value, low_k, low_v = states.key, states.value, states.low_k, states.low_v
        parts = []
        for start, end in self.spans:
            part = slice(start, end)
            parts.append(
                attend_by_reader(
                    query[:, part], key[:, part], low_k[part], up_k, (cos[part], sin[part]),
                    value[:, part], None if low_v is None else low_v[part], up_v, self.route.roles[part],
                    norm=norm, scale=scale, window=window, softcap=softcap,
                )
            )  # fmt: skip
        return torch.cat(parts)

    def read(self, layer: nn.Module, states: LayerStates) -> LayerStates:
        """What the queries of `layer` read, given what its tokens left: the same, unless a subclass says otherwise."""
        return states

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        low: torch.Tensor | None,
        up: torch.Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Every trajectory alone: by the Triton kernel on a GPU where it takes the shapes, else by dense products."""
        roles = self.route.roles
        options: dict[str, Any] = {"scale": scale, "window": window}
        if query.is_cuda and query.shape[2] <= MOST_DIMS and (low is None or low.shape[1] <= MOST_RANK):
            from lragent.kernels.varlen import varlen_lora_attention  # needs Triton, which a CPU's torch may lack

            varlen = self._varlen_layout
            # Under autocast values come in its dtype, while rotary embedding has made the others float32.
            query, key = query.to(value.dtype), key.to(value.dtype)
            return varlen_lora_attention(query, key, value, low, up, roles, varlen, softcap=softcap, **options)
        if softcap is None:
            return packed_attention(query, key, value, low, up, roles, self._packed_layout, **options)
        parts = []
        for start, end in self.spans:  # `packed_attention` knows no cap
            part = slice(start, end)
            own = None if low is None else low[part]
            parts.append(
                lora_attention(
                    query[:, part], key[:, part], value[:, part], own, up, roles[part], softcap=softcap, **options
                )
            )
        return torch.cat(parts)

    @cached_property
    def _packed_layout(self) -> PackedLayout:
        return PackedLayout.of(self.spans, self.route.roles.device)

    @cached_property
    def _varlen_layout(self) -> VarlenLayout:
        return VarlenLayout.of(self.spans, self.route.roles.device)


def attend_by_reader(
    query: torch.Tensor,
    key_base: torch.Tensor,
    low_k: torch.Tensor,
    up_k: torch.Tensor,
    rope: Rope,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    up_v: torch.Tensor | None,
    readers: torch.Tensor,
    *,
    norm: nn.Module | None = None,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention whose keys depend on the reader: `K = K_base + RoPE(LR_k B_k)`, one pass per role over its queries.

    With `norm`, `K = RoPE(norm(K_base + LR_k B_k))`. query: [Hq, Tq, D] at the end of the context; key_base: [Hkv, Tk,
    D], rotated without `norm`, else raw; low_k: [Tk, r]; up_k: [n_roles, r, Hkv * D]; rope: cos and sin, [Tk, D] each;
    norm: the model's own, over D; the rest as in `lora_attention`. Returns [Tq, Hq, D].
    """
    _, tokens, dim = query.shape
    kv_heads, keys, _ = key_base.shape
    positions = torch.arange(keys - tokens, keys, device=query.device)
    pieces, order = [], []
    for role in torch.unique(readers).tolist():
        chosen = (readers == role).nonzero().squeeze(-1)
        delta = role_up(low_k.to(up_k.dtype), up_k, torch.full((keys,), role, device=query.device))  # [Tk, Hkv * D]
        delta = delta.view(keys, kv_heads, dim).transpose(0, 1)
        if norm is None:
            key = key_base + rotate(delta, rope).to(key_base.dtype)
        else:
            key = rotate(norm(key_base + delta.to(key_base.dtype)), rope)
        pieces.append(
            lora_attention(
                query[:, chosen], key, value, low_v, up_v, readers[chosen],
                scale=scale, positions=positions[chosen], window=window, softcap=softcap,
            )
        )  # fmt: skip
        order.append(chosen)
    return torch.cat(pieces)[torch.argsort(torch.cat(order))]
