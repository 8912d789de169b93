"""Random draws for many sequences at once: temperature, top_k, top_p, min_p, then one number each says which token.

Filters apply in this order, in float32. Each keeps the best token, and ties with the last that is kept: as for one
sequence, a token goes only where another is strictly likelier. A token whose logit is NaN is never drawn; where a whole
row is NaN or -inf, token 0 is: a broken sequence gets a valid id and does not disturb the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lragent.serve.engine.types import SamplingParams
from lragent.serve.engine.upload import on_device

_COLDEST = 1e-5
"""The least temperature that logits are divided by: float32 holds the quotients."""


@dataclass(frozen=True)
class Wish:
    """What one row of logits is to yield: `uniform` in [0, 1) says where in the filtered distribution."""

    params: SamplingParams
    uniform: float

    @property
    def sorted(self) -> bool:
        """Whether the filters need the tokens in order of likelihood."""
        return self.params.top_k > 0 or self.params.top_p < 1.0


def choose(logits: torch.Tensor, wishes: Sequence[Wish]) -> torch.Tensor:
    """One token for each row. logits: [n, vocab], any floating type. Returns [n] int64. Never synchronises.

    The wishes are sorted ones only, or unsorted ones only. Needs about 30 bytes of memory per logit meanwhile, twice
    that for sorted ones.
    """
    vocab = logits.shape[1]
    columns: list[list[float]] = [
        [wish.uniform for wish in wishes],
        [max(wish.params.temperature, _COLDEST) for wish in wishes],
        [wish.params.min_p for wish in wishes],
        # Off is the last token's place, and a mass that no rounding reaches.
        [(min(wish.params.top_k, vocab) or vocab) - 1 for wish in wishes],
        [wish.params.top_p if wish.params.top_p < 1.0 else 2.0 for wish in wishes],
    ]
    numbers = on_device(columns, logits.device).unsqueeze(-1)  # [5, n, 1]
    scaled = logits.float() / numbers[1].float()
    scaled = scaled.nan_to_num(nan=float("-inf"), posinf=torch.finfo(torch.float32).max, neginf=float("-inf"))
    ids = None
    if wishes[0].sorted:
        scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
        if any(wish.params.top_k for wish in wishes):
            scaled = scaled.masked_fill(scaled < scaled.gather(1, numbers[3].long()), float("-inf"))
    probabilities = scaled.softmax(-1)
    if any(wish.params.top_p < 1.0 for wish in wishes):
        likelier = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
        probabilities = probabilities.masked_fill(likelier >= numbers[4], 0.0)
    if any(wish.params.min_p for wish in wishes):
        least = numbers[2].float() * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    places = _inverted(probabilities, numbers[0])
    return (places if ids is None else ids.gather(1, places)).squeeze(1)


def _inverted(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[n, 1]: the place in each row [vocab] at which the sum up to it passes `uniform` [n, 1] of the whole.

    Summed in float64: how a sum of float32 is rounded depends on the rows beside it (a device cuts the work by their
    number), and a sequence's answer must not.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    places = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_(max=probabilities.shape[1] - 1)
    # Sums are rounded, and are NaN where a whole row is: what lands on a token without probability takes the best.
    return torch.where(probabilities.gather(1, places) > 0.0, places, probabilities.argmax(-1, keepdim=True))
