"""Free numbers as runs: handed out in runs as long as can be, joined again when they come back."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from operator import sub

import numpy as np
import numpy.typing as npt

from lragent.errors import LRAgentError

Slots = npt.NDArray[np.int32]
"""Slot numbers, one per token, in the order of the tokens; as the device's tables hold them."""


class OutOfSlotsError(LRAgentError):
    """Fewer slots are free than were asked for; nothing was allocated."""


class FreeRuns:
    """Which of the numbers below `limit` are free: at first none.

    Numbers are handed out in runs as long as can be, so that a trajectory mostly lies in one piece and is read in
    place.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        """How many are free."""
        self._starts: list[int] = []  # free intervals [start, end), sorted, never adjacent
        self._ends: list[int] = []

    def take(self, count: int, after: int | None = None) -> Slots:
        """`count` free numbers, the run behind `after` first (to prolong what lies there), then the longest runs.

        Raises OutOfSlotsError.
        """
        if count > self.count:
            raise OutOfSlotsError(f"{count} slots were asked for and {self.count} are free.")
        runs: list[Slots] = []
        missing = count
        if after is not None and missing:
            missing -= self._take_run(after + 1, missing, runs)
        if missing:
            self._take_longest(missing, runs)
        self.count -= count
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int32)

    def take_at(self, start: int, end: int) -> None:
        """Take the interval [start, end), all of which must be free."""
        runs: list[Slots] = []
        if self._take_run(start, end - start, runs) != end - start:
            raise LRAgentError(f"Slots {start} to {end} are not all free.")
        self.count -= end - start

    def put(self, numbers: Slots) -> None:
        """Make numbers free. Raises LRAgentError, with nothing changed, where one is free already or out of range."""
        if not len(numbers):
            return
        ordered = np.sort(numbers)
        cuts = np.flatnonzero(ordered[1:] != ordered[:-1] + 1)
        firsts, lasts = [int(ordered[0]), *ordered[cuts + 1].tolist()], [*ordered[cuts].tolist(), int(ordered[-1])]
        runs = [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
        for start, end in runs:
            before = bisect_right(self._starts, start) - 1
            overlaps_before = before >= 0 and self._ends[before] > start
            overlaps_after = before + 1 < len(self._starts) and self._starts[before + 1] < end
            if start < 0 or end > self.limit or overlaps_before or overlaps_after:
                raise LRAgentError(f"Slots {start} to {end} were freed twice or do not exist.")
        if any(after[0] < before[1] for before, after in pairwise(runs)):
            raise LRAgentError("A slot was freed twice in one call.")
        for start, end in runs:
            self._put_run(start, end)
        self.count += len(numbers)

    def _take_run(self, start: int, most: int, runs: list[Slots]) -> int:
        """Take up to `most` numbers from `start` on, if that is free. Returns how many."""
        at = bisect_right(self._starts, start) - 1
        if at < 0 or self._ends[at] <= start:
            return 0
        low, high = self._starts[at], self._ends[at]
        end = min(start + most, high)
        del self._starts[at], self._ends[at]
        for piece_start, piece_end in ((end, high), (low, start)):
            if piece_start < piece_end:
                self._starts.insert(at, piece_start)
                self._ends.insert(at, piece_end)
        runs.append(np.arange(start, end, dtype=np.int32))
        return end - start

    def _take_longest(self, count: int, runs: list[Slots]) -> None:
        """Take `count` numbers from as few runs as can be: whole runs, the longest first, and the last one in part."""
        lengths = list(map(sub, self._ends, self._starts))
        missing = count
        if max(lengths) < count:
            order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
            whole: list[int] = []
            while lengths[order[len(whole)]] < missing:
                whole.append(order[len(whole)])
                missing -= lengths[whole[-1]]
            runs.extend(np.arange(self._starts[at], self._ends[at], dtype=np.int32) for at in whole)
            gone = set(whole)
            rest = [at for at in range(len(lengths)) if at not in gone]
            self._starts, self._ends = [self._starts[at] for at in rest], [self._ends[at] for at in rest]
            lengths = [lengths[at] for at in rest]
        at = lengths.index(max(lengths))
        start, end = self._starts[at], self._ends[at]
        middle = start + (end - start) // 2  # begun in its middle, if that still fits, the run's neighbour can grow
        self._take_run(middle if start > 0 and end - middle >= missing else start, missing, runs)

    def _put_run(self, start: int, end: int) -> None:
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == end:
            end = self._ends[at]
            del self._starts[at], self._ends[at]
        if at > 0 and self._ends[at - 1] == start:
            self._ends[at - 1] = end
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)

    def free(self) -> Slots:
        """Every free number, in order."""
        runs = [np.arange(*run, dtype=np.int32) for run in zip(self._starts, self._ends, strict=True)]
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int32)

    def check_integrity(self) -> None:
        """Raises AssertionError if the free intervals overlap, touch, leave the range or miscount."""
        edge = -1
        total = 0
        for start, end in zip(self._starts, self._ends, strict=True):
            assert edge < start < end <= self.limit, "free intervals overlap, touch or leave the pool"
            edge = end
            total += end - start
        assert total == self.count, "the count of free slots is wrong"
