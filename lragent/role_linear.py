"""A projection with a shared `A` and one `B` per role, as the engine runs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lragent.adapter_set import AdapterSet
from lragent.kernels.ops import add_role_up
from lragent.key_norm import key_norm
from lragent.routing import LeftForAttention, Router

UNSORTED = 64
"""So many tokens of mixed roles need not be put in order."""


class RoleLinear(LeftForAttention, nn.Module):
    """`W x + B_role A x`, the role chosen per token by the router's route.

    down: [r, d_in], the shared A. up: [n_roles, r, d_out], each role's `B` transposed, its scaling folded in.
    Where the route splits this projection, `forward` returns `W x` alone and keeps `A x` for attention (`take_low`).
    """

    def __init__(self, base: nn.Module, kind: str, down: torch.Tensor, up: torch.Tensor, router: Router) -> None:
        super().__init__()
        self.base_layer = base
        self.kind = kind
        self.router = router
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.down: torch.Tensor
        self.up: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., T, d_in]. Returns [..., T, d_out]."""
        out: torch.Tensor = self.base_layer(hidden)
        route = self.router.route
        if self.kind in route.split:
            self.leave(F.linear(hidden, self.down), out)
            return out
        if route.uniform == 0:
            return out
        low = F.linear(hidden, self.down)
        return self.add_up(out.view(-1, out.shape[-1]), low.flatten(0, -2)).view_as(out)

    def add_up(self, out: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """`out + B low`, each token's role by the route; without gradients `out` itself is added to.

        out: [T, d_out]; low: [T, r].
        """
        route = self.router.route
        if route.uniform == 0:
            return out
        if route.uniform is not None and torch.is_grad_enabled():
            return torch.addmm(out, low, self.up[route.uniform - 1])
        if route.uniform is not None:
            return out.addmm_(low, self.up[route.uniform - 1])
        return add_role_up(
            out, low, self.up, route.short_roles, route.order if out.is_cuda and len(out) > UNSORTED else None
        )

    def reader_up(self) -> torch.Tensor:
        """[n_roles, r, d_out]: what attention applies for the reader."""
        return self.up


def install_roles(model: nn.Module, adapters: AdapterSet, router: Router, room: int = 0) -> dict[str, RoleLinear]:
    """Replace every projection that `adapters` name by a `RoleLinear`, in place; the base weights stay as they are.

    room: places for roles, where there are to be more than there are roles now. Ranks that differ by module are padded
    with zeros to the largest of that kind, so that all layers' LR caches have one shape. Returns what was put in, by
    module path. Raises AttributeError where a module is missing: check the pack against the model first.
    """
    installed: dict[str, RoleLinear] = {}
    ranks: dict[str, int] = {}
    for path, shared_a in adapters.shared_a.items():
        kind = path.rpartition(".")[2]
        ranks[kind] = max(ranks.get(kind, 0), shared_a.shape[0])
    for path, shared_a in adapters.shared_a.items():
        base = model.get_submodule(path)
        parent, _, kind = path.rpartition(".")
        weight = next(base.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        missing = ranks[kind] - shared_a.shape[0]
        down = F.pad(shared_a, (0, 0, 0, missing)).to(weight.device, dtype)
        up = adapters.scaled_b(path).transpose(1, 2)
        up = F.pad(up, (0, 0, 0, missing, 0, max(0, room - len(up)))).contiguous().to(weight.device, dtype)
        layer, projection = model.get_submodule(parent), RoleLinear(base, kind, down, up, router)
        projection.keeps_base = kind == "k_proj" and key_norm(layer) is not None
        setattr(layer, kind, projection)
        installed[path] = projection
    return installed
