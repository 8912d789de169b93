"""Who processes each token of a forward pass, and what is left for attention to do.

transformers' modules pass no extra arguments to a projection, so the projections of one model share one `Router`, which
holds the `Route` of the forward pass now running.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from lragent.errors import LRAgentError


@dataclass(frozen=True)
class Route:
    """The roles of one forward pass.

    roles: [T] integers, 0 = base, i + 1 = role i. uniform: the role of all tokens, where they have only one.
    split: the projections among `k_proj`, `v_proj` that return their base part only and keep their low-rank
    activation for attention, which applies `B` as the reader's.
    """

    roles: torch.Tensor
    uniform: int | None
    split: frozenset[str] = frozenset()

    @classmethod
    def of(cls, roles: list[int], device: torch.device | str = "cpu", split: frozenset[str] = frozenset()) -> Route:
        """The route of a flat batch whose tokens have these roles."""
        first = roles[0] if roles else 0
        uniform = first if all(role == first for role in roles) else None
        return cls(torch.tensor(roles, dtype=torch.long, device=device), uniform, split)

    @cached_property
    def short_roles(self) -> torch.Tensor:
        """[T] int32: `roles` as the kernels take them."""
        return self.roles.to(torch.int32)

    @cached_property
    def order(self) -> torch.Tensor:
        """[T] int32: the order that puts tokens of one role side by side, for all layers. Needs Triton."""
        from lragent.kernels.grouped_up import group_by_role

        return group_by_role(self.short_roles)


class Router:
    """Hands the current route to the projections of one model. Not for two threads at once."""

    def __init__(self) -> None:
        self._current: Route | None = None

    @property
    def route(self) -> Route:
        """The route of the forward pass now running. Raises LRAgentError outside of `use`."""
        if self._current is None:
            raise LRAgentError("The model was called without a route: wrap the call in `with router.use(route):`.")
        return self._current

    @contextmanager
    def use(self, route: Route) -> Iterator[None]:
        """Run a forward pass (and its backward pass, if activations are recomputed there) under `route`."""
        before, self._current = self._current, route
        try:
            yield
        finally:
            self._current = before


class LeftForAttention:
    """What a split projection leaves for attention, which takes each part once in a forward pass.

    keeps_base: whether its base output is wanted too, as where keys are normalised after projection.
    """

    keeps_base = False
    _low: torch.Tensor | None = None
    _base: torch.Tensor | None = None

    def leave(self, low: torch.Tensor, base: torch.Tensor) -> None:
        """low: [..., T, r]; base: [..., T, d_out]."""
        self._low, self._base = low, base if self.keeps_base else None

    def take_low(self) -> torch.Tensor:
        """The low-rank activation [..., T, r] of the forward pass now running; it can be taken once."""
        low, self._low = self._low, None
        assert low is not None, "take_low() before forward(), or twice"
        return low

    def take_base(self) -> torch.Tensor:
        """The base output [..., T, d_out] of the forward pass now running, where it `keeps_base`; likewise."""
        base, self._base = self._base, None
        assert base is not None, "take_base() before forward(), or twice"
        return base
