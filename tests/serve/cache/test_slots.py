"""SlotPool against a set of free slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lragent.errors import LRAgentError
from lragent.serve.cache.slots import OutOfSlotsError, SlotPool

SIZE = 40


class SlotPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(SIZE)
        self.free = set(range(SIZE))
        self.serials: dict[int, int] = {}
        self.seen: set[int] = set()

    @rule(count=st.integers(0, SIZE), after=st.none() | st.integers(0, SIZE - 1))
    def allocate(self, count: int, after: int | None) -> None:
        if count > len(self.free):
            with pytest.raises(OutOfSlotsError):
                self.pool.allocate(count, after)
            return
        slots = self.pool.allocate(count, after).tolist()
        assert len(slots) == len(set(slots)) == count
        assert set(slots) <= self.free
        if after is not None and count and after + 1 in self.free:
            assert slots[0] == after + 1, "a run that could grow was not prolonged"
        self.free -= set(slots)
        serials = [int(self.pool.serial[slot]) for slot in slots]
        assert self.seen.isdisjoint(serials), "a serial number was used again"
        self.seen.update(serials)
        self.serials.update(zip(slots, serials, strict=True))

    @precondition(lambda self: len(self.free) < SIZE)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        used = sorted(set(range(SIZE)) - self.free)
        slots = data.draw(st.lists(st.sampled_from(used), unique=True))
        self.pool.free(np.array(slots, np.int64))
        self.free |= set(slots)

    @rule(slots=st.lists(st.integers(-1, SIZE), min_size=1, max_size=6))
    def refuse_what_is_not_used(self, slots: list[int]) -> None:
        sound = len(set(slots)) == len(slots) and all(0 <= s < SIZE and s not in self.free for s in slots)
        if not sound:
            with pytest.raises(LRAgentError):
                self.pool.free(np.array(slots, np.int64))

    @invariant()
    def equals_the_model(self) -> None:
        self.pool.check_integrity()
        assert set(self.pool.free_slots().tolist()) == self.free
        assert (self.pool.free_count, self.pool.used_count) == (len(self.free), SIZE - len(self.free))
        assert all(self.pool.serial[slot] == n for slot, n in self.serials.items() if slot not in self.free)


TestSlotPool = SlotPoolMachine.TestCase
TestSlotPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_allocation_takes_the_longest_runs() -> None:
    pool = SlotPool(20)
    pool.allocate(20)
    pool.free(np.array([0, 2, 3, 5, 6, 7, 9, 10, 11, 12, 14]))
    assert sorted(pool.allocate(4).tolist()) == [9, 10, 11, 12]
    assert sorted(pool.allocate(5).tolist()) == [2, 3, 5, 6, 7]
    pool.check_integrity()
    assert pool.free_slots().tolist() == [0, 14]


def test_sequences_that_grow_side_by_side_stay_in_one_run() -> None:
    pool = SlotPool(1000)
    first, second = pool.allocate(10), pool.allocate(10)
    for _ in range(30):
        first = np.concatenate([first, pool.allocate(10, int(first[-1]))])
        second = np.concatenate([second, pool.allocate(10, int(second[-1]))])
    for slots in (first, second):
        assert (np.diff(slots) == 1).all()
