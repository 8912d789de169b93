"""What the records of a study say: how many answers were right, and how the modes differ on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from lragent.errors import UserError
from lragent.eval.intervals import wilson
from lragent.eval.paired import Paired, interval
from lragent.eval.records import Record
from lragent.eval.study.regimes import REGIMES
from lragent.eval.world.levels import level_named
from lragent.modes import SharingMode

BASIS = SharingMode.NON_SHARED.value
"""The exact mode, which the others are compared with."""


@dataclass(frozen=True)
class Cell:
    """One regime in one mode, over all seeds."""

    regime: str
    mode: str
    records: tuple[Record, ...]
    """Of kind `answers`, one for each seed."""

    @cached_property
    def by_seed(self) -> dict[int, str]:
        """Right or wrong, 1 or 0 for each question that was asked, the same ones first."""
        return {record["seed"]: record["right"] for record in self.records}

    @property
    def shares(self) -> dict[int, float]:
        """Right answers of each seed, as a share."""
        return {seed: right.count("1") / len(right) for seed, right in self.by_seed.items()}

    @property
    def share(self) -> float:
        """Right answers, as a share: the mean over seeds, as a training counts alike however much it was asked."""
        return fmean(self.shares.values())

    def interval(self) -> tuple[float, float]:
        """95% of `share` for other questions, after Wilson: a bootstrap would say of no mistakes that none can be.

        It is that of one sample which varies as much as this mean of seeds does. How much a seed's share varies is told
        by the share with two right and two wrong answers more (Agresti and Coull, 1998), as none of n is not surely 0.
        """
        told = [((right.count("1") + 2) / (len(right) + 4), len(right)) for right in self.by_seed.values()]
        varies = sum(share * (1 - share) / asked for share, asked in told) / len(told) ** 2
        middle = fmean(share for share, _ in told)
        asked = middle * (1 - middle) / varies
        return wilson(self.share * asked, asked)

    @property
    def out_of_function(self) -> float:
        """Share of the questions that got no answer within the limits, mean over seeds."""
        return fmean(1 - record["endings"].get("accepted", 0) / record["asked"] for record in self.records)

    def by_kind(self, kind: str) -> tuple[int, int]:
        """Right answers and questions of one kind."""
        found = [record["kinds"].get(kind, (0, 0)) for record in self.records]
        return sum(right for right, _ in found), sum(total for _, total in found)

    def mean(self, name: str) -> float:
        """Mean over the questions, and then over the seeds, of a number that a record has the mean of."""
        return fmean(record["mean"][name] for record in self.records)


@dataclass(frozen=True)
class Difference:
    """One cell against another, on the questions that both were asked."""

    by_seed: dict[int, Paired]

    @property
    def total(self) -> Paired:
        """The questions of all seeds together."""
        pairs = self.by_seed.values()
        return Paired(
            *(sum(getattr(pair, name) for pair in pairs) for name in ("both", "only_first", "only_second", "neither"))
        )

    @property
    def points(self) -> float:
        """Of accuracy that the second has more, mean over seeds."""
        return 100 * fmean(pair.difference for pair in self.by_seed.values())

    def interval(self) -> tuple[float, float]:
        """95% of `points`, by bootstrap within each seed."""
        low, high = interval(self.by_seed.values())
        return 100 * low, 100 * high

    def widest(self) -> float:
        """Half the widest 95% interval of a single seed, in points."""
        widths = [high - low for low, high in (interval([pair]) for pair in self.by_seed.values())]
        return 50 * max(widths)


class Study:
    """Everything that the records hold."""

    def __init__(self, records: Sequence[Record]) -> None:
        """Takes those of kinds `answers` and `training`; others are passed over. Raises UserError where they are of two
        levels, or two of them of one cell: then files were put together that `lragent eval merge` must put together."""
        answers = [record for record in records if record["kind"] == "answers"]
        seen: set[tuple[Any, ...]] = set()
        for record in answers:
            cell = (record["seed"], record["regime"], record["mode"])
            if cell in seen:
                raise UserError(
                    f"records: there are two of seed {cell[0]}, {cell[1]}, {cell[2]}; merge the folders, not the files."
                )
            if len(record["right"]) != record["asked"] or set(record["right"]) - {"0", "1"}:
                raise UserError(
                    f"records: of seed {cell[0]}, {cell[1]}, {cell[2]} are of an older form; merge them anew."
                )
            if record["level"] != answers[0]["level"]:
                raise UserError(f"records: are of levels {answers[0]['level']} and {record['level']}; choose one.")
            seen.add(cell)
        self.trainings = [record for record in records if record["kind"] == "training"]
        self.level = answers[0]["level"] if answers else ""
        self.seeds = sorted({record["seed"] for record in answers})
        self.cells: dict[tuple[str, str], Cell] = {}
        for regime in REGIMES:
            for mode in SharingMode:
                found = tuple(r for r in answers if (r["regime"], r["mode"]) == (regime, mode.value))
                if found:
                    self.cells[regime, mode.value] = Cell(regime, mode.value, found)

    @property
    def regimes(self) -> list[str]:
        """Those that answered in any mode."""
        return [name for name in REGIMES if any(regime == name for regime, _ in self.cells)]

    @property
    def kinds(self) -> list[str]:
        """Of questions that were asked, in the order of the level."""
        asked = {kind for cell in self.cells.values() for record in cell.records for kind in record["kinds"]}
        return [kind for kind in level_named(self.level).mix if kind in asked]

    def tokens(self, regime: str) -> float | None:
        """That training a regime took, mean over the seeds; None where no record says."""
        found = [record["tokens"] for record in self.trainings if record["regime"] == regime]
        return fmean(found) if found else None

    @property
    def best(self) -> Cell | None:
        """The regime that answers best in the exact mode, of those that were asked with most seeds: some are easy."""
        exact = [cell for (_, mode), cell in self.cells.items() if mode == BASIS]
        return max(exact, key=lambda cell: (len(cell.by_seed), cell.share), default=None)

    def difference(self, first: Cell, second: Cell) -> Difference | None:
        """What `second` has more; None where they are one and the same, or share no question."""
        if first is second:
            return None
        pairs: dict[int, Paired] = {}
        for seed in sorted(first.by_seed.keys() & second.by_seed.keys()):
            one, other = first.by_seed[seed], second.by_seed[seed]
            asked = min(len(one), len(other))
            pairs[seed] = Paired.of(*([right == "1" for right in cell[:asked]] for cell in (one, other)))
        return Difference(pairs) if pairs else None

    def from_exact(self, regime: str, mode: str) -> Difference | None:
        """A mode against `non_shared`, of the same roles."""
        if (regime, BASIS) not in self.cells or (regime, mode) not in self.cells:
            return None
        return self.difference(self.cells[regime, BASIS], self.cells[regime, mode])

    def from_best(self, regime: str, mode: str) -> Difference | None:
        """A mode against the best `non_shared` of all regimes."""
        return None if self.best is None else self.difference(self.best, self.cells[regime, mode])
