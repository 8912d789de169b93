"""One step of the model over a flat batch of pieces, reading and writing the cache through slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from lragent.attention import AttentionPass
from lragent.modes import SharingMode
from lragent.routing import Route, Router
from lragent.serve.engine.sequence import Piece
from lragent.serve.engine.step import Step

PassOf = Callable[[Step, Route], AttentionPass]
"""Makes the attention of one step: `CachedAttention` or `KernelAttention`."""


class Runner:
    """Runs steps of one model in one sharing mode.

    attention: how a step reads and writes the cache. split: the projections whose low-rank part attention applies.
    role_of: role index by writer tag; the engine keeps it up to date.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        router: Router,
        attention: PassOf,
        mode: SharingMode,
        split: frozenset[str],
        role_of: Mapping[int, int],
    ) -> None:
        self._model = model
        self._router = router
        self._attention = attention
        self._mode = mode
        self._split = split
        self._role_of = role_of
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> torch.Tensor:
        """Process `pieces`. Returns [n, vocab]: logits after the last token of each piece that yields one, in order."""
        step = Step.of(pieces, self._mode, self._role_of)
        route = Route.of(step.roles, self._device, self._split)
        with self._router.use(route):
            out = self._model(
                input_ids=torch.as_tensor(step.tokens, device=self._device).unsqueeze(0),
                position_ids=torch.as_tensor(step.positions, device=self._device).unsqueeze(0),
                attention_pass=self._attention(step, route),
                use_cache=False,
                logits_to_keep=torch.tensor(step.keep, dtype=torch.long, device=self._device),
            )
        logits: torch.Tensor = out.logits[0]
        return logits
