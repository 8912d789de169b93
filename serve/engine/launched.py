"""A step that has been given to the device: its tokens can be read later."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.serve.engine.sampler import Drawn
from lragent.serve.engine.sequence import Sequence
from lragent.serve.engine.types import TokenLogprob


@dataclass(frozen=True)
class DeviceTimes:
    """When the device began and ended a step, and when it ended the one before, if that was not over when this one was
    launched: from then on it waited for the host."""

    began: torch.cuda.Event
    ended: torch.cuda.Event
    before: torch.cuda.Event | None

    def seconds(self) -> tuple[float, float]:
        """Busy, idle; once the step has ended."""
        idle = 0.0 if self.before is None else self.before.elapsed_time(self.began) / 1e3
        return self.began.elapsed_time(self.ended) / 1e3, idle


@dataclass(frozen=True)
class Launched:
    """sequences: those that get a token, n. logits: [n, vocab], valid until the next step is launched.

    drawn: a copy on the host, complete once the step is; None where n is 0. times: on a GPU.
    """

    sequences: tuple[Sequence, ...]
    logits: torch.Tensor
    drawn: Drawn | None
    times: DeviceTimes | None = None

    def read(self) -> list[tuple[int, TokenLogprob | None]]:
        """Each sequence's token. Waits for the device to have come so far."""
        if self.times is not None:
            self.times.ended.synchronize()
        if self.drawn is None:
            return []
        return self.drawn.read([sequence.request.params.logprobs for sequence in self.sequences])
