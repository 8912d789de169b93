"""Who waits, in which order, and for whom."""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from lragent.serve.engine.sequence import Sequence


@dataclass(eq=False)
class Place:
    """A waiting sequence's place in the line. Lower `key` goes first; among equals, who came first."""

    sequence: Sequence
    key: int
    order: int

    @property
    def rank(self) -> tuple[int, int]:
        """What places are sorted by."""
        return self.key, self.order


@dataclass
class WaitingLine:
    """Those who were preempted, then all others by key; apart from them those who are held back behind a running
    sequence until it has handed in what they need, and those who stand aside for some steps, so that nobody has to look
    after them meanwhile."""

    _front: deque[Sequence] = field(default_factory=deque)
    _places: list[Place] = field(default_factory=list)
    _behind: dict[Sequence, list[tuple[int, Place]]] = field(default_factory=dict)
    _aside: list[tuple[int, Place]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        """Everybody, those who are held back too."""
        return len(self._front) + len(self._places) + len(self._aside) + self.held_back

    @property
    def held_back(self) -> int:
        """How many are held back."""
        return sum(map(len, self._behind.values()))

    def everybody(self) -> list[Sequence]:
        """In the order in which they would go, those who stand aside and who are held back last."""
        held = [place.sequence for behind in self._behind.values() for _, place in behind]
        aside = [place.sequence for _, place in self._aside]
        return [*self._front, *(place.sequence for place in self._places), *aside, *held]

    def add(self, sequence: Sequence, key: int) -> None:
        """Let `sequence` wait at the place that `key` gives it."""
        insort(self._places, Place(sequence, key, next(self._order)), key=lambda place: place.rank)

    def add_in_front(self, sequence: Sequence) -> None:
        """Let `sequence` wait before everybody else."""
        self._front.appendleft(sequence)

    def head(self) -> Sequence | None:
        """Whose turn it is."""
        if self._front:
            return self._front[0]
        return self._places[0].sequence if self._places else None

    def pop(self) -> None:
        """The head waits no more."""
        if self._front:
            self._front.popleft()
        else:
            self._places.pop(0)

    def put_head_at(self, key: int) -> None:
        """Give the head another key; one who was preempted stays in front."""
        if not self._front and self._places[0].key != FIRST:
            place = self._places.pop(0)
            place.key = key
            insort(self._places, place, key=lambda place: place.rank)

    @property
    def head_was_preempted(self) -> bool:
        """Whether the head has run before."""
        return bool(self._front) or self._places[0].key == FIRST

    def stand_head_aside(self, until: int) -> None:
        """Take the head out of the order until step `until`. It must not have been preempted."""
        self._aside.append((until, self._places.pop(0)))

    def call_back(self, step: int | None) -> None:
        """Those who stand aside until `step` or an earlier one have their places again; all of them for None."""
        if self._aside:
            for until, place in self._aside:
                if step is None or until <= step:
                    insort(self._places, place, key=lambda place: place.rank)
            self._aside = [] if step is None else [each for each in self._aside if each[0] > step]

    def hold_head_back(self, runner: Sequence, until: int) -> None:
        """Take the head out of the order until `runner` has handed in `until` positions, or has gone."""
        place = Place(self._front.popleft(), FIRST, -next(self._order)) if self._front else self._places.pop(0)
        self._behind.setdefault(runner, []).append((until, place))

    def progressed(self, runner: Sequence, handed_in: int) -> None:
        """`runner` has handed in so many positions: who needed no more has its place again."""
        behind = self._behind.pop(runner, None)
        if behind is None:
            return
        for until, place in behind:
            if until <= handed_in:
                insort(self._places, place, key=lambda place: place.rank)
        rest = [each for each in behind if each[0] > handed_in]
        if rest:
            self._behind[runner] = rest

    def gone(self, runner: Sequence) -> None:
        """`runner` runs no more: nobody waits for it."""
        for _, place in self._behind.pop(runner, ()):
            insort(self._places, place, key=lambda place: place.rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it is."""
        if sequence in self._front:
            self._front.remove(sequence)
            return
        self._places = [place for place in self._places if place.sequence is not sequence]
        self._aside = [each for each in self._aside if each[1].sequence is not sequence]
        for runner, behind in list(self._behind.items()):
            rest = [each for each in behind if each[1].sequence is not sequence]
            if rest:
                self._behind[runner] = rest
            else:
                del self._behind[runner]

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raises AssertionError if somebody waits twice, waits for one who does not run, or is out of order."""
        everybody = self.everybody()
        assert len({id(sequence) for sequence in everybody}) == len(everybody) == len(self), "a sequence waits twice"
        assert all(self._behind.values()), "nobody waits for a sequence that is remembered"
        assert set(self._behind) <= set(running), "a sequence waits for one that does not run"
        ranks = [place.rank for place in self._places]
        assert ranks == sorted(ranks), "the line is out of order"


FIRST = -(1 << 62)
"""A key before all others."""
