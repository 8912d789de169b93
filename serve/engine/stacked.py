"""Projections of one input as one product: their weights, and the A's of adapted ones, one under the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lragent.kernels.ops import normalise, project
from lragent.key_norm import norm_eps
from lragent.role_linear import RoleLinear

Norm = tuple[torch.Tensor, float]
"""Weight and eps of an RMSNorm."""


def plain_linear(module: nn.Module | None) -> nn.Linear | None:
    """The linear layer of a projection, adapted or not, if its weight is a plain matrix of floats; else None."""
    base = module.base_layer if isinstance(module, RoleLinear) else module
    if type(base) is not nn.Linear or not base.weight.is_floating_point():
        return None
    return base


def norm_of(module: nn.Module | None) -> Norm:
    """Weight and eps of a plain RMSNorm (`lragent.key_norm.norm_eps` says which are)."""
    assert module is not None
    eps, weight = norm_eps(module), module.weight
    assert eps is not None
    assert isinstance(weight, torch.Tensor)
    return weight.data, eps


class StackedProjections:
    """Several projections, the first `head` of them before the A's of all, the others after.

    So a product with the first rows alone gives the first projections and every low-rank activation. The projections'
    own weights become parts of the stacked one: they take no memory twice, and go on working.
    """

    def __init__(self, modules: Sequence[nn.Module], head: int) -> None:
        self.modules = tuple(modules)
        linears = [linear for module in modules if (linear := plain_linear(module)) is not None]
        assert len(linears) == len(modules), "ask plain_linear before"
        adapted = [module for module in modules if isinstance(module, RoleLinear)]
        weights = [linear.weight.data for linear in linears]
        downs = [module.down for module in adapted]
        sizes = [len(weight) for weight in (*weights[:head], *downs, *weights[head:])]
        self.weight = torch.cat([*weights[:head], *downs, *weights[head:]])
        views = list(self.weight.split(sizes))
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        own = [*range(head), *range(head + len(downs), len(sizes))]
        self.spans = [(ends[at], ends[at + 1]) for at in own]
        """Columns of each projection's output in the product."""
        self.low_spans = {id(module): (ends[head + at], ends[head + at + 1]) for at, module in enumerate(adapted)}
        for linear, at in zip(linears, own, strict=True):
            linear.weight.data = views[at]
        for at, module in enumerate(adapted):
            module.down = views[head + at]
        self.bias: torch.Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            self.bias = self.weight.new_zeros(len(self.weight))
            for linear, (start, end) in zip(linears, self.spans, strict=True):
                if linear.bias is not None:
                    self.bias[start:end] = linear.bias.data
        self.first_rows = ends[head + len(downs)]
        """Rows of the first projections and of all A's."""

    def product(self, x: torch.Tensor, norm: Norm, whole_from: int = 0) -> torch.Tensor:
        """x: [T, d_in], normalised on its way. Returns [T, rows of the stack].

        whole_from: the rows of x before this one need the first projections and the low-rank activations only; what
        they get of the others is undefined.
        """
        if not whole_from:
            return project(x, self.weight, bias=self.bias, norm=norm)
        x, cut = normalise(x, *norm), self.first_rows
        out = x.new_empty(len(x), len(self.weight))
        for part, rows in ((slice(0, cut), slice(0, None)), (slice(cut, None), slice(whole_from, None))):
            out[rows, part] = project(x[rows], self.weight[part], bias=None if self.bias is None else self.bias[part])
        return out

    def low(self, product: torch.Tensor, module: nn.Module) -> torch.Tensor | None:
        """A projection's low-rank activation [T, r] in the product, None where it has no adapter."""
        span = self.low_spans.get(id(module))
        return None if span is None else product[:, span[0] : span[1]]
