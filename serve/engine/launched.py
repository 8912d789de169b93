"""A step that has been given to the device: its tokens can be read later."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.serve.engine.sampler import Drawn
from lragent.serve.engine.sequence import Sequence
from lragent.serve.engine.types import TokenLogprob


@dataclass(frozen=True)
class Launched:
    """sequences: those that get a token, n. logits: [n, vocab], valid until the next step is launched.

    drawn: a copy on the host, complete once `done` has come to pass; None is at once. None where n is 0.
    """

    sequences: tuple[Sequence, ...]
    logits: torch.Tensor
    drawn: Drawn | None
    done: torch.cuda.Event | None

    def read(self) -> list[tuple[int, TokenLogprob | None]]:
        """Each sequence's token. Waits for the device to have come so far."""
        if self.done is not None:
            self.done.synchronize()
        if self.drawn is None:
            return []
        return self.drawn.read([sequence.request.params.logprobs for sequence in self.sequences])
