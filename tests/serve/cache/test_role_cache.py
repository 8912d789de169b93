"""RoleCache in all four modes, against a model that follows what is written into every slot.

The model writes into each slot what a real forward pass would have put there: the whole history that the entry depends
on. So a slot that is freed too early, shared by mistake or found by the wrong reader shows as a wrong history. What may
be found is worked out by brute force over the histories that lie in the trees.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lragent.modes import SharingMode
from lragent.serve.cache.role_cache import Lease, OutOfSlotsError, Reader, RoleCache

ROLES = (Reader("plan's", 101), Reader("action's", 102), Reader("reflect's", 103))
WRITERS = [role.writer for role in ROLES]
SALTS = ("", "tenant")
TOKENS = st.integers(0, 2)
SLOTS = 40

History = tuple[tuple[int, int], ...]
"""(token, writer) of every position up to and with the entry's own."""


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


@dataclass(eq=False)
class Running:
    """A sequence as an engine has it: `computed` positions are processed."""

    lease: Lease
    computed: int
    committed: int = 0


class RoleCacheMachine(RuleBasedStateMachine):
    mode: SharingMode

    def __init__(self) -> None:
        super().__init__()
        self.live = list(WRITERS)
        self.running: list[Running] = []
        self.texts: list[list[int]] = [[]]
        self.base: dict[int, tuple[tuple[str, ...], History]] = {}  # by slot: under which names, and what it holds
        self.low: dict[int, tuple[tuple[str, ...], History]] = {}
        self.births = itertools.count()
        self.born: dict[int, int] = {}  # by base slot: which forward pass wrote it
        self.over: dict[int, int] = {}  # by LR slot: which base entry it stands beside

    @initialize(per=st.sampled_from([1, 3, 8]), growth=st.sampled_from([1, 4, 64]))
    def start(self, per: int, growth: int) -> None:
        """LR entries may be as large as base entries, or much smaller."""
        self.per = per
        self.cache = RoleCache(self.mode, SLOTS, lr_per_slot=per, a_digest="A", growth=growth)
        self.cache.set_live_writers(self.live)

    @property
    def residuals(self) -> bool:
        return self.mode is SharingMode.BASE_SHARED

    def names(self, lease: Lease) -> tuple[str, ...]:
        if self.mode is SharingMode.NON_SHARED:
            return (lease.salt, lease.reader.digest)
        return (lease.salt,)

    def found_by(self, reader: Reader, names: tuple[str, ...], tokens: list[int], opening: int) -> set[History]:
        """The longest histories of `tokens` but the last that lie in the base tree and may be read."""
        there = {self.base[slot] for slot in self.cache.base_tree.all_slots().tolist()}
        longest: set[History] = {()}
        for position, token in enumerate(tokens[:-1]):
            writers = [reader.writer] if position >= len(tokens) - opening else WRITERS
            grown = {(*p, (token, w)) for p in longest for w in writers if w in self.live}
            grown = {p for p in grown if (names, p) in there}
            if not grown:
                break
            longest = grown
        return longest

    def residual_length(self, lease: Lease) -> int:
        """For how many of the found base entries this reader's LR lies in the LR tree, beside these very entries."""
        in_tree = self.cache.lr_tree.all_slots().tolist()
        there = {(self.low[slot], self.over[slot]) for slot in in_tree}
        history = tuple(zip(lease.tokens.tolist(), lease.tags.tolist(), strict=True))
        names = (lease.salt, lease.reader.digest)
        for n in range(lease.base_reused):
            if ((names, history[: n + 1]), self.born[int(lease.base_slots[n])]) not in there:
                return n
        return lease.base_reused

    @rule(data=st.data(), role=st.sampled_from(ROLES), salt=st.sampled_from(SALTS), room=st.integers(0, 6))
    def open(self, data: st.DataObject, role: Reader, salt: str, room: int) -> None:
        self.begin(data, role, salt, room)

    def begin(self, data: st.DataObject, role: Reader, salt: str, room: int) -> Running:
        """A prompt that goes on from a text that was seen, whole or in part, or repeats it."""
        known = data.draw(st.sampled_from(self.texts))
        known = known[: data.draw(st.just(len(known)) | st.integers(0, len(known)))]
        tokens = (known + data.draw(st.lists(TOKENS, min_size=not known, max_size=6)))[:20]
        opening = data.draw(st.integers(1, min(3, len(tokens))))
        tags = [role.writer] * len(tokens)
        if self.mode.one_writer_per_token:
            tags = [data.draw(st.sampled_from(WRITERS)) for _ in tokens]
            tags[len(tokens) - opening :] = [role.writer] * opening
        lease = self.cache.open(
            ints(tokens), ints(tags), opening=opening, reader=role, salt=salt, capacity=len(tokens) + room
        )
        found = self.found_by(role, self.names(lease), tokens, opening)
        history = tuple(zip(tokens, lease.tags.tolist(), strict=False))
        assert lease.base_reused < len(tokens), "the last position was reused"
        assert history[: lease.base_reused] in found
        assert [w for _, w in history[lease.base_reused :]] == tags[lease.base_reused :]
        start = lease.base_reused
        if self.residuals:
            start = self.residual_length(lease)
            assert lease.lr_reused == start <= lease.base_reused
        else:
            assert lease.lr_reused == (lease.base_reused if self.mode.decomposed else 0)
        self.texts.append(tokens)
        self.running.append(Running(lease, start))
        return self.running[-1]

    @rule(data=st.data(), role=st.sampled_from(ROLES), answer=st.lists(TOKENS, max_size=4))
    def take_a_turn(self, data: st.DataObject, role: Reader, answer: list[int]) -> None:
        """A request from its beginning to its end."""
        each = self.begin(data, role, "", len(answer))
        for token in [*answer, None]:
            if not self.process(each, each.lease.length):
                break
            self.hand_in(each, each.computed)
            if token is not None:
                each.lease.append(token, role.writer)
        self.texts.append(each.lease.tokens[: each.computed].tolist())
        self.end(each, each.computed)

    def pick(self, data: st.DataObject) -> Running:
        return data.draw(st.sampled_from(self.running))

    def has_room(self, base: int, low: int) -> bool:
        """Whether so many slots were free if all that is part of nobody's context were gone."""
        held: set[int] = set()
        held_low: set[int] = set()
        for each in self.running:
            held.update(each.lease.base_slots[: each.lease.reserved].tolist())
            held_low.update(each.lease.lr_slots[: each.lease.lr_reserved].tolist())
        pages = {slot // self.per for slot in held_low}
        low -= len(pages) * self.per - len(held_low)
        return base + max(0, -(-low // self.per)) <= SLOTS - len(held) - len(pages)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 16))
    def compute(self, data: st.DataObject, count: int) -> None:
        """Process some positions, as an engine's step does."""
        each = self.pick(data)
        self.process(each, min(each.lease.length, each.computed + count))

    def process(self, each: Running, end: int) -> bool:
        """Whether there was room for it."""
        lease = each.lease
        low = max(0, end - lease.lr_reserved) if self.residuals else 0
        enough = self.has_room(max(0, end - lease.reserved), low)
        before = {*self.cache.base_tree.all_slots().tolist()}
        evicted = self.cache.counters.base_evicted
        assert self.cache.fits(lease, end) == enough
        if not enough:
            with pytest.raises(OutOfSlotsError):
                self.cache.reserve(lease, end)
            assert before == {*self.cache.base_tree.all_slots().tolist()}, "evicted for nothing"
            return False
        self.cache.reserve(lease, end)
        assert lease.capacity >= lease.reserved >= end
        assert lease.lr_reserved >= end or not self.residuals
        gone = before - {*self.cache.base_tree.all_slots().tolist()}
        assert len(gone) == self.cache.counters.base_evicted - evicted
        history = tuple(zip(lease.tokens.tolist(), lease.tags.tolist(), strict=True))
        for n in range(each.computed, end):
            slot = int(lease.base_slots[n])
            if n >= lease.base_reused:
                self.base[slot] = (self.names(lease), history[: n + 1])
                self.born[slot] = next(self.births)
            if self.residuals:
                self.low[int(lease.lr_slots[n])] = ((lease.salt, lease.reader.digest), history[: n + 1])
        each.computed = end
        return True

    @precondition(lambda self: any(each.computed == each.lease.length < each.lease.capacity for each in self.running))
    @rule(data=st.data(), token=TOKENS)
    def generate(self, data: st.DataObject, token: int) -> None:
        complete = [each for each in self.running if each.computed == each.lease.length < each.lease.capacity]
        each = data.draw(st.sampled_from(complete))
        each.lease.append(token, each.lease.reader.writer)
        self.texts.append(each.lease.tokens[: each.lease.length].tolist())

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        each = self.pick(data)
        self.hand_in(each, data.draw(st.integers(0, each.computed)))

    def hand_in(self, each: Running, length: int) -> None:
        """Commit. An LR entry belongs to the base entry that lies beside it once both are in the trees."""
        in_tree = {*self.cache.lr_tree.all_slots().tolist()}
        lease = each.lease
        slots = lease.base_slots.copy(), lease.lr_slots.copy()
        lease.told, lease.lr_told = data_told = (each.computed, each.computed if self.residuals else 0)
        self.cache.commit(lease, length)
        assert (lease.base_slots[: lease.told] == slots[0][: lease.told]).all(), "a slot changed and nobody is told"
        assert (lease.lr_slots[: lease.lr_told] == slots[1][: lease.lr_told]).all()
        changed = [np.flatnonzero(a != b) for a, b in zip((lease.base_slots, lease.lr_slots), slots, strict=True)]
        for now, then, where in zip((lease.told, lease.lr_told), data_told, changed, strict=True):
            assert now == (min(then, int(where[0])) if len(where) else then)
        if self.residuals:
            for n in range(each.committed, length):
                slot, born = int(each.lease.lr_slots[n]), self.born[int(each.lease.base_slots[n])]
                if n >= each.lease.lr_reused and slot not in in_tree:
                    self.over[slot] = born
                assert self.over[slot] == born, "an LR stands beside another base entry than its own"
        each.committed = max(each.committed, length)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), complete=st.booleans())
    def close(self, data: st.DataObject, complete: bool) -> None:
        """End at what is computed, or somewhere before (a step past the end of the turn, a cancelled request)."""
        each = self.pick(data)
        self.end(each, each.computed if complete else data.draw(st.integers(0, each.computed)))

    def end(self, each: Running, length: int) -> None:
        self.hand_in(each, length)
        self.cache.close(each.lease, length)
        self.running.remove(each)

    @rule(live=st.sets(st.sampled_from(WRITERS)))
    def load_roles(self, live: set[int]) -> None:
        self.live = sorted(live)
        self.cache.set_live_writers(self.live)

    @rule()
    def load_all_roles(self) -> None:
        self.load_roles(set(WRITERS))

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        held = {slot for each in self.running for slot in each.lease.base_slots[: each.lease.reserved].tolist()}
        assert {*self.cache.base_tree.all_slots().tolist()} <= held

    @invariant()
    def every_context_is_whole(self) -> None:
        self.cache.check_integrity()
        for each in self.running:
            lease = each.lease
            assert lease.lr_committed <= lease.committed, "an LR entry is locked and its base entry is not"
            history = tuple(zip(lease.tokens.tolist(), lease.tags.tolist(), strict=True))
            for n in range(max(each.computed, lease.base_reused)):
                assert self.base[int(lease.base_slots[n])] == (self.names(lease), history[: n + 1])
            for n in range(each.computed if self.residuals else 0):
                own = ((lease.salt, lease.reader.digest), history[: n + 1])
                assert self.low[int(lease.lr_slots[n])] == own

    def teardown(self) -> None:
        for each in self.running:
            self.cache.close(each.lease, each.computed)
        self.cache.check_integrity()
        self.cache.clear()
        self.cache.check_integrity()
        assert self.cache.base_pool.used_count == self.cache.lr_pool.used_count == 0
        assert self.cache.base_tree.size == self.cache.lr_tree.size == 0


FEW = settings(max_examples=40, stateful_step_count=40, deadline=None)


class NonShared(RoleCacheMachine):
    mode = SharingMode.NON_SHARED


class FullShared(RoleCacheMachine):
    mode = SharingMode.FULL_SHARED


class BaseShared(RoleCacheMachine):
    mode = SharingMode.BASE_SHARED


class BaseLRShared(RoleCacheMachine):
    mode = SharingMode.BASE_LR_SHARED


TestNonShared, TestFullShared = NonShared.TestCase, FullShared.TestCase
TestBaseShared, TestBaseLRShared = BaseShared.TestCase, BaseLRShared.TestCase
TestNonShared.settings = TestFullShared.settings = TestBaseShared.settings = TestBaseLRShared.settings = FEW


def run_over(cache: RoleCache, tokens: list[int], role: Reader) -> Lease:
    """A request without an answer, still open: all of its prompt is computed and handed in."""
    lease = cache.open(ints(tokens), ints([role.writer] * len(tokens)), opening=1, reader=role, salt="", capacity=0)
    cache.reserve(lease, len(tokens))
    cache.commit(lease, len(tokens))
    return lease


def test_an_lr_prefill_keeps_its_base_entries_as_young_as_itself() -> None:
    """Else the base entries, found before the LR was written, would be evicted before it."""
    cache = RoleCache(SharingMode.BASE_SHARED, 13, lr_per_slot=1, growth=1)
    cache.set_live_writers(WRITERS)
    first = run_over(cache, [1, 2, 3, 4], ROLES[0])
    cache.close(first, 4)
    second = cache.open(ints([1, 2, 3, 9]), ints([102] * 4), opening=1, reader=ROLES[1], salt="", capacity=0)
    assert (second.base_reused, second.lr_reused) == (3, 0)
    cache.reserve(second, 3)
    cache.commit(second, 3)
    cache.close(second, 3)
    third = cache.open(ints([5, 6, 7, 8]), ints([103] * 4), opening=1, reader=ROLES[2], salt="", capacity=0)
    for length in range(1, 5):
        cache.reserve(third, length)
        cache.check_integrity()
    cache.close(third, 4)
    cache.check_integrity()


def test_the_split_follows_use() -> None:
    """Memory that base entries had is taken by LR entries, and given back."""
    cache = RoleCache(SharingMode.BASE_SHARED, 60, lr_per_slot=4, growth=1, slot_bytes=100)
    cache.set_live_writers(WRITERS)
    for start in range(0, 200, 20):
        cache.close(run_over(cache, list(range(start, start + 20)), ROLES[0]), 20)
        cache.check_integrity()
    assert cache.memory().base_used >= 4000
    before = cache.memory().lr_used
    assert before <= 1200
    for role in (*ROLES, *(Reader(f"role {n}'s", 200 + n) for n in range(4))):
        lease = cache.open(ints(range(180, 200)), ints([101] * 20), opening=1, reader=role, salt="", capacity=0)
        cache.reserve(lease, 20)
        cache.commit(lease, 20)
        cache.close(lease, 20)
        cache.check_integrity()
    assert cache.memory().lr_used >= 7 * 19 // 4 * 100 > 2 * before
    assert cache.memory().base_used + cache.memory().lr_used <= cache.memory().base_total == 6000
    cache.clear()
    assert cache.memory().base_used == cache.memory().lr_used == 0
