"""What a request's tokens cost: separate rates for those computed, reused and generated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lragent.errors import UserError
from lragent.serve.engine.types import Usage

WHOLE = 10**12
"""Costs are counted in whole trillionths of the unit, so that sums are exact in any order."""


@dataclass(frozen=True)
class Prices:
    """Rates in `unit` for `per` tokens. The default counts the tokens that the model had to process.

    fresh: prompt tokens that were computed. reused: those whose cache was found. generated: the answer's. lr_prefill:
    those run over an existing base cache, in `base_shared`; None: as `fresh`. Raises UserError for a negative rate.
    """

    unit: str = "tokens"
    per: int = 1
    fresh: float = 1.0
    reused: float = 0.0
    generated: float = 1.0
    lr_prefill: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.per <= 10**9:
            raise UserError(f"per: must be 1 to 1000000000 tokens, not {self.per}.")
        for name in ("fresh", "reused", "generated", "lr_prefill"):
            rate = getattr(self, name)
            if rate is not None and not (math.isfinite(rate) and 0 <= rate <= 10**6):
                raise UserError(f"{name}: must be 0 to 1000000, not {rate}.")

    def cost(self, usage: Usage) -> int:
        """What a request cost, in `WHOLE`ths of the unit."""
        prefill = self.fresh if self.lr_prefill is None else self.lr_prefill
        computed = usage.tokens_computed - usage.lr_prefilled
        return (
            computed * self._rate(self.fresh)
            + usage.lr_prefilled * self._rate(prefill)
            + (usage.prompt_tokens - usage.tokens_computed) * self._rate(self.reused)
            + usage.completion_tokens * self._rate(self.generated)
        )

    def most(self, prompt: int, answer: int) -> int:
        """The most that a request of so many tokens can cost."""
        prefill = self.fresh if self.lr_prefill is None else self.lr_prefill
        return prompt * self._rate(max(self.fresh, self.reused, prefill)) + answer * self._rate(self.generated)

    def affordable(self, prompt: int, left: int) -> int | None:
        """How many tokens an answer to so many may have for `left`; None: any number. Negative: not even the prompt."""
        rest = left - self.most(prompt, 0)
        rate = self._rate(self.generated)
        if rest < 0:
            return -1
        return None if rate == 0 else rest // rate

    def _rate(self, rate: float) -> int:
        return round(rate * WHOLE / self.per)


def in_units(cost: int) -> float:
    """`WHOLE`ths as a number of units, for people."""
    return cost / WHOLE
