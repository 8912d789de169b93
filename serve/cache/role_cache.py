"""What is cached for whom: the two radix trees, the slot pools, and the leases that running sequences hold on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from lragent.modes import SharingMode
from lragent.serve.cache.elements import Ints, Kinds, Tokens, with_room
from lragent.serve.cache.lease import Lease, Reader
from lragent.serve.cache.pages import PagedPool
from lragent.serve.cache.radix import Accept, Namespace, Node, RadixTree
from lragent.serve.cache.slots import OutOfSlotsError, SlotPool, Slots
from lragent.serve.cache.view import CacheView, NodeView


@dataclass(frozen=True)
class CacheMemory:
    """Bytes by part of the cache: base entries (or full ones), and LR entries."""

    base_used: int
    base_total: int
    lr_used: int
    lr_total: int


@dataclass
class CacheCounters:
    """Running sums since the cache was made."""

    base_evicted: int = 0
    lr_evicted: int = 0
    base_allocated: int = 0
    lr_allocated: int = 0


@dataclass
class RoleCache:
    """The cache of one engine in one sharing mode. Holds no tensors: slots only.

    slots: size of the base pool (keys and values). lr_per_slot: in `base_shared` LR entries have a tree of their own,
    and so many of them lie in a page, which is a slot of the base pool; elsewhere an LR lies under its base entry's
    slot. a_digest: content digest of the shared A, which names who may read the LR of others. growth: slots that a
    growing sequence takes at once where there are enough, so that sequences that grow side by side stay in long runs.
    slot_bytes: what a slot of the base pool takes. lr_slot_bytes: what the LR that lies under the same slot takes more.

    Eviction takes the leaf, of either tree, that was not used for the longest time, so base and LR cache share the
    memory as they use it. An LR entry is used only together with its base entry and goes first where both are as old:
    so what its base entry's eviction would leave dead has gone before.
    """

    mode: SharingMode
    slots: int
    lr_per_slot: int = 1
    a_digest: str = ""
    growth: int = 64
    slot_bytes: int = 0
    lr_slot_bytes: int = 0
    counters: CacheCounters = field(default_factory=CacheCounters)

    def __post_init__(self) -> None:
        self.base_pool = SlotPool(self.slots)
        self.base_tree = RadixTree()
        self.lr_pool = PagedPool(self.base_pool, self.lr_per_slot)
        self.lr_tree = RadixTree(self.lr_pool.idle_changed)
        self._now = 0
        self._leases: set[Lease] = set()
        self._live: Ints = np.empty(0, np.int64)
        self._live_kinds: frozenset[int] = frozenset()

    @property
    def own_residuals(self) -> bool:
        """Whether LR entries live apart from base entries."""
        return self.mode is SharingMode.BASE_SHARED

    @property
    def longest(self) -> int:
        """Positions that a sequence may have if it has the whole pool."""
        if not self.own_residuals:
            return self.slots
        return self.slots * self.lr_per_slot // (self.lr_per_slot + 1)

    @property
    def base_used(self) -> int:
        """Slots that hold base entries."""
        return self.base_pool.used_count - self.lr_pool.page_count

    def memory(self) -> CacheMemory:
        """How the memory is used now. In `base_shared` both parts may take all of it."""
        pages = self.lr_pool.page_count
        lr_total = self.slots * (self.slot_bytes if self.own_residuals else self.lr_slot_bytes)
        return CacheMemory(
            base_used=self.base_used * self.slot_bytes,
            base_total=self.slots * self.slot_bytes,
            lr_used=pages * self.slot_bytes if self.own_residuals else self.base_used * self.lr_slot_bytes,
            lr_total=lr_total,
        )

    @property
    def bytes_per_token(self) -> int:
        """What a position takes whose base and LR cache are held."""
        lr = self.slot_bytes // self.lr_per_slot if self.own_residuals else self.lr_slot_bytes
        return self.slot_bytes + lr

    def set_live_writers(self, tags: list[int]) -> None:
        """Entries of other writers are misses from now on, until their writer is live again."""
        self._live = np.array(sorted(tags), dtype=np.int64)
        self._live_kinds = frozenset(tags)

    def is_live(self, tags: Ints, kinds: Kinds = None) -> npt.NDArray[np.bool_]:
        """Which of these writers, of these kinds, are loaded. (Where each must be looked at: np.isin for a short sorted
        list, ten times as fast.)"""
        if kinds is not None and kinds <= self._live_kinds:
            return np.ones(len(tags), np.bool_)
        if not len(self._live):
            return np.zeros(len(tags), np.bool_)
        return np.asarray(self._live.take(self._live.searchsorted(tags), mode="clip") == tags)

    def readable(self, prompt: int, opening: int, reader: Reader) -> Accept:
        """Which base entries a prompt of so many positions may read: those of loaded writers, and at its last `opening`
        positions those of `reader` alone."""
        own_from = prompt - opening

        def accept(start: int, entry_tags: Ints, kinds: Kinds) -> npt.NDArray[np.bool_]:
            good = self.is_live(entry_tags, kinds)
            own = max(0, own_from - start)
            good[own:] &= entry_tags[own:] == reader.writer
            return good

        return accept

    def open(self, tokens: Tokens, tags: Ints, *, opening: int, reader: Reader, salt: str, capacity: int) -> Lease:
        """Find what is cached of a prompt, and hold it.

        tokens: [P]. tags: [P], who is to write each position if no entry is found. The last `opening` positions hit
        entries of `reader` alone, and the last position is never reused: the answer's first logits come from it.
        """
        self._now += 1
        prompt = len(tokens)
        capacity = max(capacity, prompt)
        found = tokens[: prompt - 1]
        namespace = self.base_namespace(reader, salt)
        accept = self.readable(prompt, opening, reader)
        base, written_by, node = self.base_tree.match(namespace, found, accept, self._now, reader.writer)
        self.base_tree.lock(node)
        lease = Lease(
            reader=reader,
            salt=salt,
            tokens=with_room(capacity, tokens),
            tags=with_room(capacity, written_by, tags[len(base) :]),
            length=prompt,
            prompt=prompt,
            base_reused=len(base),
            lr_reused=len(base) if self.mode is SharingMode.BASE_LR_SHARED else 0,
            base_slots=with_room(capacity, base),
            lr_slots=np.empty(0, np.int32),
            reserved=len(base),
            lr_reserved=0,
            committed=len(base),
            lr_committed=0,
            node=node,
            lr_node=None,
        )
        if self.own_residuals:
            self._open_residual(lease, found[: len(base)])
        self._leases.add(lease)
        return lease

    def _open_residual(self, lease: Lease, found: Tokens) -> None:
        serials = self.base_pool.serial[lease.base_slots[: len(found)]]

        def accept(start: int, entry_tags: Ints, _: Kinds) -> npt.NDArray[np.bool_]:
            return entry_tags == serials[start : start + len(entry_tags)]

        residual, _, node = self.lr_tree.match(self._lr_namespace(lease), found, accept, self._now, lease.reader.writer)
        self.lr_tree.lock(node)
        lease.lr_slots, lease.lr_node = with_room(lease.capacity, residual), node
        lease.lr_reused = lease.lr_committed = lease.lr_reserved = len(residual)

    def measure(self, tokens: Tokens, *, opening: int, reader: Reader, salt: str) -> int:
        """How many positions of a prompt `open` would find and a role need not run over. Changes nothing.

        In `base_shared` base entries without the role's own LR save no work; they are not looked for.
        """
        accept = self.readable(len(tokens), opening, reader)
        if self.own_residuals:  # an upper bound: whether each LR's base entry is readable is seen when it is opened
            return self.lr_tree.measure((salt, "role", reader.digest), tokens[:-1], _everything)
        return self.base_tree.measure(self.base_namespace(reader, salt), tokens[:-1], accept)

    def handed_in(self, lease: Lease) -> int:
        """Positions of `lease` that are in the trees with all that belongs to them."""
        return lease.lr_committed if self.own_residuals else lease.committed

    def promised(self, lease: Lease, opening: int, runner: Lease, gain: int) -> int:
        """How many positions `lease`, just opened for a prompt with that `opening`, would find once `runner` has
        computed its own prompt; 0 where it is not worth to wait: where that is not `gain` more than it has found.

        Base cache is found by whoever may read it, an LR cache of `base_shared` by the same role.
        """
        if self.handed_in(runner) >= runner.prompt:
            return 0
        if self.base_namespace(lease.reader, lease.salt) != self.base_namespace(runner.reader, runner.salt):
            return 0
        most = min(lease.prompt - 1, runner.prompt)
        same = lease.tokens[:most] == runner.tokens[:most]
        same &= self.readable(lease.prompt, opening, lease.reader)(0, runner.tags[:most], None)
        length = most if same.all() else int(same.argmin())
        if runner.committed < length and length - lease.base_reused >= gain:
            return length
        low = self.own_residuals and self._lr_namespace(lease) == self._lr_namespace(runner)
        return length if low and runner.lr_committed < length and length - lease.lr_reused >= gain else 0

    def fits(self, lease: Lease, length: int, beside: Iterable[Lease] = ()) -> bool:
        """Whether `reserve` would find slots now, and then all that `beside` have yet to reserve for what is known of
        them."""
        base, low = self._missing(lease, length)
        for other in beside:
            more_base, more_low = self._missing(other, other.length)
            base, low = base + more_base, low + more_low
        pool, lr_pool = self.base_pool, self.lr_pool
        if base + lr_pool.pages_for(low) <= pool.free_count:
            return True
        evictable = self.base_tree.idle_size + lr_pool.loose
        return base + lr_pool.pages_after_eviction(low) <= pool.free_count + evictable

    @property
    def now(self) -> int:
        """The time of the trees, which grows with every lookup and commit."""
        return self._now

    def displaces(self, count: int, beside: Iterable[Lease], since: int) -> bool:
        """Whether `count` new positions, beside what `beside` have yet to reserve, would have room, but in part that of
        entries which a request has found since the time `since`: of somebody who is likely to come back for them."""
        wanted = count + sum(self._missing(other, other.length)[0] for other in beside) - self.base_pool.free_count
        return 0 < wanted <= self.base_tree.idle_size and wanted > self.base_tree.idle_not_found_since(since)

    def _missing(self, lease: Lease, length: int) -> tuple[int, int]:
        """Base and LR slots that `lease` lacks for `length` positions."""
        low = max(0, length - lease.lr_reserved) if self.own_residuals else 0
        return max(0, length - lease.reserved), low

    def reserve(self, lease: Lease, length: int) -> None:
        """Slots for all positions below `length`, evicting what nobody holds.

        Raises OutOfSlotsError where that is not enough; then nothing was evicted and the lease is as before.
        """
        base, low = self._missing(lease, length)
        if not base and not low:
            return
        if not self.fits(lease, length):
            raise OutOfSlotsError(f"{length} positions need more slots than are free or can be evicted.")
        self._make_room(base, low)
        roomy = min(lease.capacity, -(-length // self.growth) * self.growth)
        if low:
            self._grow_residual(lease, min(roomy, lease.lr_reserved + max(low, self.lr_pool.free_count)), low)
        if base:
            wanted = roomy - lease.reserved
            count = wanted if self.base_pool.free_count >= wanted else base
            after = int(lease.base_slots[lease.reserved - 1]) if lease.reserved else None
            lease.base_slots[lease.reserved : lease.reserved + count] = self.base_pool.allocate(count, after)
            lease.reserved += count
            self.counters.base_allocated += count

    def _grow_residual(self, lease: Lease, roomy: int, needed: int) -> None:
        """`needed` LR slots, and more up to `roomy` positions out of pages that are there already."""
        count = max(needed, roomy - lease.lr_reserved)
        after = int(lease.lr_slots[lease.lr_reserved - 1]) if lease.lr_reserved else None
        lease.lr_slots[lease.lr_reserved : lease.lr_reserved + count] = self.lr_pool.allocate(count, after)
        lease.lr_reserved += count
        self.counters.lr_allocated += count

    def _make_room(self, base: int, low: int) -> None:
        """Evict until so many base and LR slots are free, and somewhat more, so that it is seldom needed."""
        more = self.slots // 64
        short = base + self.lr_pool.pages_for(low) - self.base_pool.free_count
        if short <= 0:
            return
        while short + more > 0 and self._evict_oldest(short + more):
            short = base + self.lr_pool.pages_for(low) - self.base_pool.free_count

    def _evict_oldest(self, most: int) -> bool:
        """Evict up to `most` slots' worth of the least recently used leaf of either tree. False if there is none."""
        oldest, oldest_lr = self.base_tree.oldest(), self.lr_tree.oldest()
        if oldest_lr is not None and (oldest is None or oldest_lr <= oldest):
            gone = self.lr_tree.evict_from_oldest(most * self.lr_per_slot)
            self.lr_pool.free(gone)
            self.counters.lr_evicted += len(gone)
        else:
            gone = self.base_tree.evict_from_oldest(most)
            self.base_pool.free(gone)
            self.counters.base_evicted += len(gone)
        return len(gone) > 0

    def commit(self, lease: Lease, length: int) -> None:
        """Hand the first `length` positions, which are computed, to the trees, so that others can reuse them.

        Where another sequence has handed in the same entries meanwhile, the lease goes on with theirs. Costs what is
        new, however long the lease is already.
        """
        self._now += 1
        if length > lease.committed:
            part = slice(lease.committed, length)
            namespace = self.base_namespace(lease.reader, lease.salt)
            owned, node = self.base_tree.insert(
                namespace, lease.tokens[part], lease.tags[part], lease.base_slots[part], self._now, lease.node
            )
            self.base_tree.lock(node, above=lease.node)
            lease.told = min(lease.told, _adopt(lease.base_slots, part, owned, self.base_pool))
            lease.node, lease.committed = node, length
        if self.own_residuals and length > lease.lr_committed:
            self.base_tree.touch(lease.node, self._now)  # never older than the LR that names it
            part = slice(lease.lr_committed, length)
            serials = self.base_pool.serial[lease.base_slots[part]]
            owned, node = self.lr_tree.insert(
                self._lr_namespace(lease), lease.tokens[part], serials, lease.lr_slots[part], self._now, lease.lr_node
            )
            self.lr_tree.lock(node, above=lease.lr_node)
            lease.lr_told = min(lease.lr_told, _adopt(lease.lr_slots, part, owned, self.lr_pool))
            lease.lr_node, lease.lr_committed = node, length

    def close(self, lease: Lease, length: int) -> None:
        """End a lease of which the first `length` positions are computed: they stay cached, all else is freed."""
        self.commit(lease, length)
        self.base_pool.free(lease.base_slots[lease.committed : lease.reserved])
        self.base_tree.unlock(lease.node)
        if self.own_residuals:
            self.lr_pool.free(lease.lr_slots[lease.lr_committed : lease.lr_reserved])
            self.lr_tree.unlock(lease.lr_node)
        self._leases.remove(lease)

    def view(self, most: int) -> CacheView:
        """Up to `most` runs of each tree, those used last. Takes time by what is shown, not by what is there."""
        nodes: list[NodeView] = []
        whole = True
        for part, tree in _parts(self.base_tree, self.lr_tree):
            ids: dict[Node, int] = {}
            recent, all_of_it = tree.recent(most)
            whole = whole and all_of_it
            for name, node, start in recent:
                ids[node] = len(nodes)
                nodes.append(
                    NodeView(
                        id=len(nodes),
                        parent=None if node.parent is None else ids.get(node.parent),
                        part=part,
                        owner=name[2] if name[1] == "role" else "",
                        start=start,
                        length=len(node),
                        writers=_runs(node.tags) if part == "base" else (),
                        readers=tuple(sorted(node.readers)),
                        held=node.locks,
                        last_used=node.last_used,
                    )
                )
        return CacheView(tuple(nodes), whole, self._now)

    def clear(self) -> None:
        """Drop every entry that nobody holds."""
        self.lr_pool.free(self.lr_tree.evict(self.lr_tree.size))
        self.base_pool.free(self.base_tree.evict(self.base_tree.size))

    def base_namespace(self, reader: Reader, salt: str) -> Namespace:
        """Where base entries that `reader` may read are kept."""
        if self.mode is SharingMode.NON_SHARED:
            return (salt, "role", reader.digest)
        if self.mode is SharingMode.BASE_LR_SHARED:
            return (salt, "shared A", self.a_digest)
        return (salt, "common")

    def _lr_namespace(self, lease: Lease) -> Namespace:
        return (lease.salt, "role", lease.reader.digest)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot is free, in a tree, in one lease or an LR page, and only in one of
        them, every lock belongs to a lease, and every LR entry's base entry is there."""
        leases = self._leases
        held = [(each.base_slots, each.committed, each.reserved, each.node) for each in leases]
        private = [slots[committed:reserved] for slots, committed, reserved, _ in held]
        everywhere = [self.base_pool.free_slots(), self.base_tree.all_slots(), self.lr_pool.all_pages(), *private]
        assert np.array_equal(np.sort(np.concatenate(everywhere)), np.arange(self.slots)), "a slot has not one owner"
        self.base_pool.check_integrity()
        _check_paths(self.base_tree, held)
        held = [(each.lr_slots, each.lr_committed, each.lr_reserved, each.lr_node) for each in leases]
        private = [slots[committed:reserved] for slots, committed, reserved, _ in held]
        everywhere = [self.lr_pool.free_slots(), self.lr_tree.all_slots(), *private]
        inside = (self.lr_pool.all_pages()[:, None] * self.lr_per_slot + np.arange(self.lr_per_slot)).ravel()
        assert np.array_equal(np.sort(np.concatenate(everywhere)), inside), "an LR slot has not one owner"
        self.lr_pool.check_integrity(self.lr_tree.idle_slots())
        _check_paths(self.lr_tree, held)
        alive = self.base_pool.serial[self.base_tree.all_slots()]
        assert np.isin(self.lr_tree.all_tags(), alive).all(), "an LR entry outlived its base entry"


def _parts(base: RadixTree, low: RadixTree) -> tuple[tuple[Literal["base", "lr"], RadixTree], ...]:
    return ("base", base), ("lr", low)


def _runs(tags: Ints) -> tuple[tuple[int, int], ...]:
    """`tags` as (tag, how many)."""
    starts = np.concatenate([[0], np.flatnonzero(tags[1:] != tags[:-1]) + 1, [len(tags)]])
    return tuple((int(tags[start]), int(end - start)) for start, end in itertools.pairwise(starts))


def _everything(_: int, tags: Ints, __: Kinds) -> npt.NDArray[np.bool_]:
    return np.ones(len(tags), np.bool_)


def _adopt(slots: Slots, part: slice, owned: Slots, pool: SlotPool | PagedPool) -> int:
    """Put a tree's own slots in the place of those that were offered. Returns the first position that changes."""
    changed = np.flatnonzero(owned != slots[part])
    if not len(changed):
        return len(slots)
    pool.free(slots[part][changed])
    slots[part] = owned
    return part.start + int(changed[0])


def _check_paths(tree: RadixTree, held: list[tuple[Slots, int, int, Node | None]]) -> None:
    tree.check_integrity([node for *_, node in held])
    for slots, committed, _, node in held:
        assert np.array_equal(tree.path_slots(node), slots[:committed]), "a lease and its path disagree"


__all__ = ["CacheCounters", "CacheMemory", "Lease", "OutOfSlotsError", "Reader", "RoleCache"]
