"""LR entries that share one pool with base entries: so many to a page, which is the room of one base slot.

How memory is split between base and LR cache is not decided beforehand: pages are taken from the base pool when LR
entries need room, and go back when they are empty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lragent.errors import LRAgentError
from lragent.serve.cache.runs import FreeRuns, OutOfSlotsError, Slots
from lragent.serve.cache.slots import SlotPool


class PagedPool:
    """Allocates LR slots: entry i of page p is slot `p * per + i`. pages: the base pool. per: entries to a page.

    Knows of every page how many of its entries are idle, that is, could be evicted (`idle_changed` is told by the LR
    tree): so `obtainable` is exact without looking at any entry.
    """

    def __init__(self, pages: SlotPool, per: int) -> None:
        self.pages = pages
        self.per = per
        self.page_count = 0
        """Pages that are taken from the base pool."""
        self.loose = 0
        """Pages of which every used entry is idle: evicting makes them base slots again."""
        self.room = 0
        """Entries in the other pages that are free, or idle."""
        self._free = FreeRuns(pages.size * per)
        self._used = np.zeros(pages.size, np.int64)  # entries by page; a page with none is not ours
        self._idle = np.zeros(pages.size, np.int64)

    @property
    def free_count(self) -> int:
        """Free entries in pages that are taken already."""
        return self._free.count

    @property
    def used_count(self) -> int:
        """Entries that are allocated."""
        return self.page_count * self.per - self._free.count

    def pages_for(self, count: int) -> int:
        """How many more pages `count` more entries take."""
        return -(-max(0, count - self._free.count) // self.per)

    def pages_after_eviction(self, count: int) -> int:
        """The same, were all idle entries evicted and the loose pages given back."""
        return -(-max(0, count - self.room) // self.per)

    def allocate(self, count: int, after: int | None = None) -> Slots:
        """`count` entries, those behind entry `after` first. Takes pages as needed. Raises OutOfSlotsError."""
        fresh = self.pages_for(count)
        if fresh > self.pages.free_count:
            raise OutOfSlotsError(f"{count} LR slots take {fresh} pages and {self.pages.free_count} slots are free.")
        if fresh:
            taken = self.pages.allocate(fresh, None if after is None else after // self.per)
            entries: Slots = np.add.outer(taken * self.per, np.arange(self.per, dtype=np.int32)).ravel()
            self._free.put(entries)
            self.page_count += fresh
        slots = self._free.take(count, after)
        self._count(slots, used=1)
        return slots

    def free(self, slots: Slots) -> None:
        """Give entries back, and to the base pool the pages that hold none any more.

        Raises LRAgentError, with nothing freed, where one is free already or does not exist.
        """
        if not len(slots):
            return
        pages, counts = self._by_page(slots)
        if pages[0] < 0 or pages[-1] >= self.pages.size or (self._used[pages] < counts).any():
            raise LRAgentError("An LR slot was freed twice or does not exist.")
        self._free.put(slots)
        self._count(slots, used=-1)
        empty = pages[self._used[pages] == 0]
        for run in np.split(empty, np.flatnonzero(np.diff(empty) != 1) + 1):
            if len(run):
                self._free.take_at(int(run[0]) * self.per, (int(run[-1]) + 1) * self.per)
        self.page_count -= len(empty)
        self.pages.free(empty)

    def idle_changed(self, slots: Slots, by: int) -> None:
        """These used entries can be evicted from now on (by = 1), or no longer (-1)."""
        self._count(slots, idle=by)

    def _by_page(self, slots: Slots) -> tuple[Slots, npt.NDArray[np.int64]]:
        """The pages of some slots, in order, and how many of the slots each has.

        Slots come in long runs, of which only the ends are looked at.
        """
        cuts = np.flatnonzero(slots[1:] != slots[:-1] + 1)
        firsts, lasts = slots[np.append(0, cuts + 1)], slots[np.append(cuts, len(slots) - 1)]
        before = firsts // self.per
        spans = lasts // self.per - before + 1
        offset = before - np.cumsum(spans) + spans  # from the number of a page among those of all runs to the page
        pages = np.arange(spans.sum()) + np.repeat(offset, spans)
        starts = np.maximum(np.repeat(firsts, spans), pages * self.per)
        ends = np.minimum(np.repeat(lasts, spans) + 1, (pages + 1) * self.per)
        if not len(cuts):
            return pages, ends - starts
        unique, inverse = np.unique(pages, return_inverse=True)
        return unique, np.bincount(inverse, ends - starts, len(unique)).astype(np.int64)

    def _count(self, slots: Slots, *, used: int = 0, idle: int = 0) -> None:
        if not len(slots):
            return
        pages, counts = self._by_page(slots)
        loose, room = self._sums(pages)
        self._used[pages] += used * counts
        self._idle[pages] += idle * counts
        loose_now, room_now = self._sums(pages)
        self.loose += loose_now - loose
        self.room += room_now - room

    def _sums(self, pages: Slots) -> tuple[int, int]:
        """What `pages` add to `loose` and to `room`."""
        used = self._used[pages]
        held = used - self._idle[pages]
        return int(((held == 0) & (used > 0)).sum()), int((self.per - held)[held > 0].sum())

    def all_pages(self) -> Slots:
        """The base slots that are pages now, in order."""
        return np.flatnonzero(self._used).astype(np.int32)

    def free_slots(self) -> Slots:
        """Every free entry of the pages, in order."""
        return self._free.free()

    def check_integrity(self, idle: Slots) -> None:
        """Raises AssertionError if a page is counted wrongly, empty, or free in the base pool. idle: all idle slots."""
        self._free.check_integrity()
        pages = self.all_pages()
        assert len(pages) == self.page_count, "the count of pages is wrong"
        free = np.bincount(self._free.free() // self.per, minlength=self.pages.size)
        expected = np.zeros_like(self._used)
        expected[pages] = self.per
        assert np.array_equal(free + self._used, expected), "a page's entries are neither free nor used"
        assert not np.isin(pages, self.pages.free_slots()).any(), "a page is free in the base pool"
        assert np.array_equal(np.bincount(idle // self.per, minlength=self.pages.size), self._idle), (
            "idle is miscounted"
        )
        assert (self.loose, self.room) == self._sums(pages), "what can be evicted is miscounted"
