"""PagedPool against sets: which entries are used, which pages are taken, and what eviction would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lragent.errors import LRAgentError
from lragent.serve.cache.pages import PagedPool
from lragent.serve.cache.slots import OutOfSlotsError, SlotPool

SIZE = 12


def ints(values) -> np.ndarray:
    return np.array(sorted(values), np.int64)


class PagedPoolMachine(RuleBasedStateMachine):
    @initialize(per=st.sampled_from([1, 3, 8]))
    def start(self, per: int) -> None:
        self.base = SlotPool(SIZE)
        self.pool = PagedPool(self.base, per)
        self.per = per
        self.base_used: set[int] = set()
        self.used: set[int] = set()
        self.idle: set[int] = set()

    @property
    def pages(self) -> set[int]:
        return {slot // self.per for slot in self.used}

    @rule(count=st.integers(0, 30), after=st.none() | st.integers(0, 8 * SIZE - 1))
    def allocate(self, count: int, after: int | None) -> None:
        spare = len(self.pages) * self.per - len(self.used)
        free_pages = SIZE - len(self.base_used) - len(self.pages)
        before = self.pages
        if count > spare + free_pages * self.per:
            with pytest.raises(OutOfSlotsError):
                self.pool.allocate(count, after)
            return
        slots = self.pool.allocate(count, after).tolist()
        assert len(set(slots)) == len(slots) == count
        assert self.used.isdisjoint(slots)
        self.used |= set(slots)
        assert len(self.pages - before) <= -(-max(0, count - spare) // self.per), "more pages were taken than needed"

    @precondition(lambda self: self.used)
    @rule(data=st.data(), idle=st.booleans())
    def free(self, data: st.DataObject, idle: bool) -> None:
        """What is evicted is idle up to the moment it goes."""
        from_these = sorted(self.idle if idle else self.used - self.idle)
        some = data.draw(st.lists(st.sampled_from(from_these), unique=True)) if from_these else []
        if idle:
            self.pool.idle_changed(ints(some), -1)
            self.idle -= set(some)
        self.pool.free(np.array(some, np.int64))
        self.used -= set(some)

    @precondition(lambda self: self.used - self.idle)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.used - self.idle)), unique=True))
        self.pool.idle_changed(np.array(some, np.int64), 1)
        self.idle |= set(some)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def hold_again(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.idle)), unique=True))
        self.pool.idle_changed(np.array(some, np.int64), -1)
        self.idle -= set(some)

    @rule(count=st.integers(0, SIZE))
    def take_base_slots(self, count: int) -> None:
        if count <= self.base.free_count:
            self.base_used |= set(self.base.allocate(count).tolist())

    @precondition(lambda self: self.base_used)
    @rule(data=st.data())
    def free_base_slots(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.base_used)), unique=True))
        self.base.free(np.array(some, np.int64))
        self.base_used -= set(some)

    @rule(slots=st.lists(st.integers(-1, 8 * SIZE), min_size=1, max_size=5))
    def refuse_what_is_not_used(self, slots: list[int]) -> None:
        if len(set(slots)) < len(slots) or not set(slots) <= self.used:
            with pytest.raises(LRAgentError):
                self.pool.free(np.array(slots, np.int64))

    @invariant()
    def equals_the_model(self) -> None:
        self.pool.check_integrity(ints(self.idle))
        assert set(self.pool.all_pages().tolist()) == self.pages
        assert self.base.free_count == SIZE - len(self.base_used) - len(self.pages)
        assert self.pool.used_count == len(self.used)
        held = {slot // self.per for slot in self.used - self.idle}
        assert self.pool.loose == len(self.pages - held)
        assert self.pool.room == len(held) * self.per - len(self.used - self.idle)
        for count in range(0, 30, 7):
            fresh = -(-max(0, count - (len(self.pages) * self.per - len(self.used))) // self.per)
            assert self.pool.pages_for(count) == fresh


TestPagedPool = PagedPoolMachine.TestCase
TestPagedPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_long_context_lies_in_one_run() -> None:
    pool = PagedPool(SlotPool(100), 48)
    first = pool.allocate(100)
    grown = np.concatenate([first, pool.allocate(500, int(first[-1]))])
    assert (np.diff(grown) == 1).all()
    assert pool.page_count == -(-600 // 48)
