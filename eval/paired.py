"""Two ways to answer the same questions, compared: by how much they differ, and whether that can be chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Of a bootstrap interval."""


@dataclass(frozen=True)
class Paired:
    """How many questions each of two ways got right, and how many both."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """From right or wrong of the same questions in the same order. Raises ValueError."""
        pairs = list(zip(first, second, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def total(self) -> int:
        """Questions."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Share right of the second less that of the first."""
        return (self.only_second - self.only_first) / self.total

    @property
    def mcnemar(self) -> float:
        """The exact two-sided p-value of McNemar's test: how likely questions that only one way got right are to be so
        unevenly shared out, or more so, were both ways equally good."""
        few, n = min(self.only_first, self.only_second), self.only_first + self.only_second
        ways, tail = 1, 0
        for k in range(few + 1):
            tail += ways
            ways = ways * (n - k) // (k + 1)
        return min(1.0, 2 * tail / 2**n)


def interval(pairs: Iterable[Paired], *, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean difference of `pairs` (one for each seed of training, which all weigh the
    same), questions drawn anew within each. To draw questions is to draw how many fall into each of the four cells.

    Where no question of a seed tells both ways apart, drawing them anew shows no difference either. There may still be
    some: at most the share of which as many would all be alike in 2.5% of cases (Clopper and Pearson, 1934). By that of
    the seed that was asked least, the bounds are wider.
    """
    pairs = list(pairs)
    rng = np.random.default_rng(seed)
    differences = np.zeros(RESAMPLES)
    for pair in pairs:
        shares = np.array([pair.both, pair.only_first, pair.only_second, pair.neither]) / pair.total
        drawn = rng.multinomial(pair.total, shares, RESAMPLES)
        differences += (drawn[:, 2] - drawn[:, 1]) / pair.total
    low, high = np.percentile(differences / len(pairs), [2.5, 97.5])
    least = min((pair.total for pair in pairs if not (pair.only_first or pair.only_second)), default=None)
    unseen = 0.0 if least is None else (1 - 0.025 ** (1 / least)) / len(pairs)
    return float(low) - unseen, float(high) + unseen
