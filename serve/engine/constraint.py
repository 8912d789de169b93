"""Which tokens an answer may go on with: by its grammar, and by how long it must be at least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from lragent.serve.engine.grammar import Bits, Matcher


@dataclass(frozen=True)
class Allowed:
    """at: ascending indices of rows of logits. bits: [len(at), words] int32 on the host, see `Bits`."""

    at: list[int]
    bits: torch.Tensor

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of `logits` [n, vocab] in which what is not allowed is -inf."""
        bits = self.bits.pin_memory() if logits.is_cuda else self.bits
        bits = bits.to(logits.device, non_blocking=True)
        token = torch.arange(logits.shape[1], device=logits.device)
        banned = (bits[:, token // 32] >> (token % 32).int()) & 1 == 0
        logits = logits.clone()
        for row, at in enumerate(self.at):
            logits[at].masked_fill_(banned[row], float("-inf"))
        return logits


class Constraint:
    """One answer's. matcher: of its grammar, if it has one. least: tokens before it may end by one of `ends`."""

    def __init__(self, matcher: Matcher | None, least: int, ends: Iterable[int]) -> None:
        self.matcher = matcher
        self._least = least
        self._ends = [(end // 32, np.uint32(1) << np.uint32(end % 32)) for end in ends]

    def limits(self, index: int) -> bool:
        """Whether the token at `index` of the answer is limited at all."""
        return self.matcher is not None or index < self._least

    def allow(self, bits: Bits, index: int) -> None:
        """Write what the token at `index` may be. Raises UserError where the grammar takes too much work."""
        if self.matcher is None:
            bits.fill(-1)
        else:
            self.matcher.allow(bits)
        if index < self._least:
            before = bits.copy()
            for word, bit in self._ends:
                bits.view(np.uint32)[word] &= ~bit
            if not bits.any():  # the grammar is complete: it has the last word
                bits[:] = before

    def take(self, token: int) -> None:
        """The answer goes on with `token`. Raises UserError where the grammar does not."""
        if self.matcher is not None:
            self.matcher.take(token)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete."""
        return self.matcher is not None and self.matcher.ended
