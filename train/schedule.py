"""How far a run has come, and the learning rate there."""

from __future__ import annotations

import math
import time


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear up to `peak` over the first `warmup` of the run, then along a cosine to zero. progress: 0..1."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Clock:
    """How much of the time for steps is used up. Evaluations cost a run time twice, before and after its steps."""

    def __init__(self, seconds: float | None, spent: float = 0.0) -> None:
        """seconds: for steps, None = without end; spent: of them before an interruption."""
        self._seconds = None if seconds is None else max(1e-9, seconds)
        self._begin = time.monotonic() - spent

    def spent(self) -> float:
        """Seconds since the first step."""
        return time.monotonic() - self._begin

    def share(self) -> float:
        """0 at the first step, 1 when the time is up."""
        return 0.0 if self._seconds is None else self.spent() / self._seconds
