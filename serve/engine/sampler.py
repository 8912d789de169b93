"""How the next token is chosen."""

from __future__ import annotations

import torch

from lragent.serve.engine.types import SamplingParams


class Sampler:
    """Draws the tokens of one request; its own generator, so that a seed gives the same answer in any batch."""

    def __init__(self, params: SamplingParams, fallback_seed: int) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(
            (params.seed if params.seed is not None else fallback_seed) % 2**63
        )

    def next_token(self, logits: torch.Tensor) -> int:
        """logits: [vocab]. Greedy where temperature is 0."""
        if self._params.temperature == 0.0:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits, self._params).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[vocab] float32: after temperature, top_k, top_p and min_p, in this order. The best token always remains."""
    scaled = logits.float() / max(params.temperature, 1e-5)
    if 0 < params.top_k < scaled.numel():
        floor = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1.0:
        ordered, index = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # mass of everything likelier
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(0, index, ordered)
    if params.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()
