"""Which slots of a pool are free. A slot is where one token's cache lives; its page size is one token."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import sub

import numpy as np
import numpy.typing as npt

from lragent.errors import LRAgentError

Slots = npt.NDArray[np.int64]
"""Slot numbers, one per token, in the order of the tokens."""


class OutOfSlotsError(LRAgentError):
    """Fewer slots are free than were asked for; nothing was allocated."""


class SlotPool:
    """Allocates slots in runs as long as can be, so that a trajectory mostly lies in one piece and is read in place.

    Every allocation of a slot gets a new serial number: a reference that names slot and serial can tell a slot that was
    freed and used again from the one it meant.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.free_count = size
        self.serial: Slots = np.zeros(size, dtype=np.int64)
        self._next_serial = 1
        self._starts: list[int] = [0] if size else []  # free intervals [start, end), sorted, never adjacent
        self._ends: list[int] = [size] if size else []

    @property
    def used_count(self) -> int:
        """Slots that are allocated."""
        return self.size - self.free_count

    def allocate(self, count: int, after: int | None = None) -> Slots:
        """`count` free slots, the run behind slot `after` first (to prolong what lies there), then the longest runs.

        Raises OutOfSlotsError.
        """
        if count > self.free_count:
            raise OutOfSlotsError(f"{count} slots were asked for and {self.free_count} are free.")
        runs: list[Slots] = []
        missing = count
        if after is not None and missing:
            missing -= self._take(after + 1, missing, runs)
        if missing:
            self._take_longest(missing, runs)
        slots = np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)
        self.serial[slots] = np.arange(self._next_serial, self._next_serial + count)
        self._next_serial += count
        self.free_count -= count
        return slots

    def free(self, slots: Slots) -> None:
        """Give slots back. Raises LRAgentError, with nothing freed, where one is free already or out of range."""
        if not len(slots):
            return
        ordered = np.sort(slots)
        cuts = np.flatnonzero(np.diff(ordered) != 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(ordered, cuts)]
        for start, end in runs:
            before = bisect_right(self._starts, start) - 1
            overlaps_before = before >= 0 and self._ends[before] > start
            overlaps_after = before + 1 < len(self._starts) and self._starts[before + 1] < end
            if start < 0 or end > self.size or overlaps_before or overlaps_after:
                raise LRAgentError(f"Slots {start} to {end} were freed twice or do not exist.")
        if len(np.unique(ordered)) != len(ordered):
            raise LRAgentError("A slot was freed twice in one call.")
        for start, end in runs:
            self._put(start, end)
        self.free_count += len(slots)

    def _take(self, start: int, most: int, runs: list[Slots]) -> int:
        """Take up to `most` slots from `start` on, if that is free. Returns how many."""
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
        runs.append(np.arange(start, end, dtype=np.int64))
        return end - start

    def _take_longest(self, count: int, runs: list[Slots]) -> None:
        """Take `count` slots from as few runs as can be: whole runs, the longest first, and the last one in part."""
        lengths = list(map(sub, self._ends, self._starts))
        missing = count
        if max(lengths) < count:
            order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
            whole: list[int] = []
            while lengths[order[len(whole)]] < missing:
                whole.append(order[len(whole)])
                missing -= lengths[whole[-1]]
            runs.extend(np.arange(self._starts[at], self._ends[at], dtype=np.int64) for at in whole)
            gone = set(whole)
            rest = [at for at in range(len(lengths)) if at not in gone]
            self._starts, self._ends = [self._starts[at] for at in rest], [self._ends[at] for at in rest]
            lengths = [lengths[at] for at in rest]
        at = lengths.index(max(lengths))
        start, end = self._starts[at], self._ends[at]
        middle = start + (end - start) // 2  # begun in its middle, if that still fits, the run's neighbour can grow
        self._take(middle if start > 0 and end - middle >= missing else start, missing, runs)

    def _put(self, start: int, end: int) -> None:
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == end:
            end = self._ends[at]
            del self._starts[at], self._ends[at]
        if at > 0 and self._ends[at - 1] == start:
            self._ends[at - 1] = end
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)

    def check_integrity(self) -> None:
        """Raises AssertionError if the free intervals overlap, touch, leave the pool or miscount."""
        edge = -1
        total = 0
        for start, end in zip(self._starts, self._ends, strict=True):
            assert edge < start < end <= self.size, "free intervals overlap, touch or leave the pool"
            edge = end
            total += end - start
        assert total == self.free_count, "the count of free slots is wrong"

    def free_slots(self) -> Slots:
        """Every free slot, in order."""
        runs = [np.arange(*run, dtype=np.int64) for run in zip(self._starts, self._ends, strict=True)]
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)
