"""What a layer has computed of a step's new tokens, on its way into the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from lragent.attention import split_keys, split_projection
from lragent.rope import Rope
from lragent.routing import Route


@dataclass(frozen=True)
class NewStates:
    """One layer's, of T tokens.

    query: [T, Hq, D]; key, value: [T, Hkv, D], the base part where a projection is split. low_v, low_k: [T, r], the
    low-rank activation of a split projection, and up_v, up_k: [n_roles, r, Hkv * D], each reader's `B` for it. rope:
    cos and sin of the new tokens, [T, D] each, where query and key still have to be rotated, the query in place.
    norm: what normalises keys when they are read, where `key` is raw, as k_proj gave it.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    low_v: torch.Tensor | None = None
    up_v: torch.Tensor | None = None
    low_k: torch.Tensor | None = None
    up_k: torch.Tensor | None = None
    rope: Rope | None = None
    norm: nn.Module | None = None


class CachePass(ABC):
    """One step through the cache, seen from its attention layers: an AttentionPass.

    route: the roles of its tokens. base_from: rows of the step before this one have their base cache already: their
    keys and values are not wanted.
    """

    route: Route
    base_from: int

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
        new = left_states(layer, query, key, value, self.route)
        return self.through_cache(int(layer.layer_idx), new, scale, window, softcap)  # type: ignore[arg-type]  # all have it

    @abstractmethod
    def through_cache(
        self, index: int, new: NewStates, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """Write what is new of layer `index` to the cache, then read the whole context of each piece: [T, Hq, D]."""


def left_states(
    layer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, route: Route
) -> NewStates:
    """What transformers' attention layer hands over (see AttentionPass.attend), with what its projections left."""
    v_proj, k_proj = split_projection(layer, "v_proj", route), split_projection(layer, "k_proj", route)
    key, norm = (key, None) if k_proj is None else split_keys(layer, k_proj, key)
    return NewStates(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        low_v=None if v_proj is None else v_proj.take_low()[0],
        up_v=None if v_proj is None else v_proj.reader_up(),
        low_k=None if k_proj is None else k_proj.take_low()[0],
        up_k=None if k_proj is None else k_proj.reader_up(),
        norm=norm,
    )
