"""What comes after a model's last layer, in one launch each: the norm, and the head over the vocabulary."""

from __future__ import annotations

import torch
from torch import nn

from lragent.kernels.ops import normalise, project
from lragent.serve.engine.stacked import norm_of


class FusedNorm(nn.Module):
    """Stands in for a plain RMSNorm, whose weight it shares."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, T, d]."""
        return normalise(hidden[0], *norm_of(self.norm)).unsqueeze(0)


class FusedHead(nn.Module):
    """Stands in for a linear layer, whose weight it shares."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, T, d]. Returns [1, T, vocab]."""
        return project(hidden[0], self.weight, bias=self.bias).unsqueeze(0)
