"""What is cached for whom: the two radix trees, the slot pools, and the leases that running sequences hold on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lragent.modes import SharingMode
from lragent.serve.cache.radix import Ints, Namespace, Node, RadixTree
from lragent.serve.cache.slots import OutOfSlotsError, SlotPool, Slots


@dataclass(frozen=True)
class Reader:
    """The role that asks, as the cache knows it.

    digest: content digest of its weights. writer: the tag under which entries that it writes are kept.
    """

    digest: str
    writer: int


@dataclass(eq=False)
class Lease:
    """A running sequence's hold on the cache.

    Positions below `committed` belong to the trees (locked); from there on to the end of `base_slots` (and `lr_slots`)
    the slots are the lease's own. `tokens`, `tags` have room for `capacity` positions; `length` of them are filled.
    """

    reader: Reader
    salt: str
    tokens: Ints
    tags: Ints
    length: int
    base_reused: int
    """Prompt positions whose base (or full) cache was found."""
    lr_reused: int
    """Prompt positions whose LR cache was found; 0 where values are cached whole."""
    base_slots: Slots
    lr_slots: Slots
    committed: int = 0
    lr_committed: int = 0
    told: int = 0
    lr_told: int = 0
    node: Node | None = None
    lr_node: Node | None = None

    @property
    def capacity(self) -> int:
        """How many positions this sequence may ever have."""
        return len(self.tokens)

    def append(self, token: int, tag: int) -> None:
        """One more token, to be processed by the writer `tag`."""
        self.tokens[self.length] = token
        self.tags[self.length] = tag
        self.length += 1


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

    slots: size of the base pool (keys and values). lr_slots: size of the LR pool; in `base_lr_shared` an LR lies under
    the slot of its base entry, so only `base_shared` has a pool and a tree of its own for it.
    a_digest: content digest of the shared A, which names who may read the LR of others.
    growth: slots that a growing sequence takes at once where there are enough, so that sequences that grow side by side
    stay in long runs.
    """

    mode: SharingMode
    slots: int
    lr_slots: int = 0
    a_digest: str = ""
    growth: int = 64
    counters: CacheCounters = field(default_factory=CacheCounters)

    def __post_init__(self) -> None:
        self.base_pool = SlotPool(self.slots)
        self.base_tree = RadixTree()
        self.lr_pool = SlotPool(self.lr_slots if self.own_residuals else 0)
        self.lr_tree = RadixTree()
        self._leases: set[Lease] = set()
        self._live: Ints = np.empty(0, np.int64)

    @property
    def own_residuals(self) -> bool:
        """Whether LR entries live apart from base entries."""
        return self.mode is SharingMode.BASE_SHARED

    def set_live_writers(self, tags: list[int]) -> None:
        """Entries of other writers are misses from now on, until their writer is live again."""
        self._live = np.array(sorted(tags), dtype=np.int64)

    def _is_live(self, tags: Ints) -> npt.NDArray[np.bool_]:
        """np.isin for a short sorted list, ten times as fast: a match asks it at every node."""
        if not len(self._live):
            return np.zeros(len(tags), np.bool_)
        return np.asarray(self._live.take(self._live.searchsorted(tags), mode="clip") == tags)

    def open(self, tokens: Ints, tags: Ints, *, opening: int, reader: Reader, salt: str, capacity: int) -> Lease:
        """Find what is cached of a prompt, and hold it.

        tokens: [P]. tags: [P], who is to write each position if no entry is found. The last `opening` positions hit
        entries of `reader` alone, and the last position is never reused: the answer's first logits come from it.
        """
        prompt = len(tokens)
        found = tokens[: prompt - 1]
        own_from = prompt - opening

        def accept(start: int, entry_tags: Ints) -> npt.NDArray[np.bool_]:
            good = self._is_live(entry_tags)
            own = max(0, own_from - start)
            good[own:] &= entry_tags[own:] == reader.writer
            return good

        base, written_by, node = self.base_tree.match(self._base_namespace(reader, salt), found, accept)
        self.base_tree.lock(node)
        lease = Lease(
            reader=reader,
            salt=salt,
            tokens=np.concatenate([tokens, np.zeros(max(0, capacity - prompt), np.int64)]),
            tags=np.concatenate([written_by, tags[len(base) :], np.zeros(max(0, capacity - prompt), np.int64)]),
            length=prompt,
            base_reused=len(base),
            lr_reused=len(base) if self.mode is SharingMode.BASE_LR_SHARED else 0,
            base_slots=base,
            lr_slots=np.empty(0, np.int64),
            committed=len(base),
            node=node,
        )
        if self.own_residuals:
            self._open_residual(lease, found[: len(base)])
        self._leases.add(lease)
        return lease

    def _open_residual(self, lease: Lease, found: Ints) -> None:
        serials = self.base_pool.serial[lease.base_slots]

        def accept(start: int, entry_tags: Ints) -> npt.NDArray[np.bool_]:
            return entry_tags == serials[start : start + len(entry_tags)]

        residual, _, node = self.lr_tree.match(self._lr_namespace(lease), found, accept)
        self.lr_tree.lock(node)
        lease.lr_slots, lease.lr_node = residual, node
        lease.lr_reused = lease.lr_committed = len(residual)

    def fits(self, lease: Lease, length: int) -> bool:
        """Whether `reserve` would find slots now."""
        fits = length - len(lease.base_slots) <= _obtainable(self.base_pool, self.base_tree)
        if self.own_residuals:
            fits = fits and length - len(lease.lr_slots) <= _obtainable(self.lr_pool, self.lr_tree)
        return fits

    def reserve(self, lease: Lease, length: int) -> None:
        """Slots for all positions below `length`, evicting what nobody holds.

        Raises OutOfSlotsError where that is not enough; then nothing was evicted and the lease is as before.
        """
        if not self.fits(lease, length):
            raise OutOfSlotsError(f"{length} positions need more slots than are free or can be evicted.")
        roomy = min(lease.capacity, -(-length // self.growth) * self.growth)
        if len(lease.base_slots) < length:
            fresh, evicted = _allocate(self.base_pool, self.base_tree, lease.base_slots, length, roomy)
            lease.base_slots = np.concatenate([lease.base_slots, fresh])
            self.counters.base_allocated += len(fresh)
            self.counters.base_evicted += evicted
        if self.own_residuals and len(lease.lr_slots) < length:
            fresh, evicted = _allocate(self.lr_pool, self.lr_tree, lease.lr_slots, length, roomy)
            lease.lr_slots = np.concatenate([lease.lr_slots, fresh])
            self.counters.lr_allocated += len(fresh)
            self.counters.lr_evicted += evicted

    def commit(self, lease: Lease, length: int) -> None:
        """Hand the first `length` positions, which are computed, to the trees, so that others can reuse them.

        Where another sequence has handed in the same entries meanwhile, the lease goes on with theirs.
        """
        part = slice(0, length)
        tokens = lease.tokens[part]
        if length > lease.committed:
            namespace = self._base_namespace(lease.reader, lease.salt)
            owned, node = self.base_tree.insert(namespace, tokens, lease.tags[part], lease.base_slots[part])
            self.base_tree.lock(node)
            self.base_tree.unlock(lease.node)
            changed = owned != lease.base_slots[part]
            if changed.any():
                lease.told = min(lease.told, int(changed.argmax()))
            self.base_pool.free(lease.base_slots[part][changed])
            lease.base_slots[part], lease.node, lease.committed = owned, node, length
        if self.own_residuals and length > lease.lr_committed:
            serials = self.base_pool.serial[lease.base_slots[part]]
            owned, node = self.lr_tree.insert(self._lr_namespace(lease), tokens, serials, lease.lr_slots[part])
            self.lr_tree.lock(node)
            self.lr_tree.unlock(lease.lr_node)
            changed = owned != lease.lr_slots[part]
            if changed.any():
                lease.lr_told = min(lease.lr_told, int(changed.argmax()))
            self.lr_pool.free(lease.lr_slots[part][changed])
            lease.lr_slots[part], lease.lr_node, lease.lr_committed = owned, node, length

    def close(self, lease: Lease, length: int) -> None:
        """End a lease of which the first `length` positions are computed: they stay cached, all else is freed."""
        self.commit(lease, length)
        self.base_pool.free(lease.base_slots[lease.committed :])
        self.base_tree.unlock(lease.node)
        if self.own_residuals:
            self.lr_pool.free(lease.lr_slots[lease.lr_committed :])
            self.lr_tree.unlock(lease.lr_node)
        self._leases.remove(lease)

    def clear(self) -> None:
        """Drop every entry that nobody holds."""
        self.base_pool.free(self.base_tree.evict(self.base_tree.size))
        self.lr_pool.free(self.lr_tree.evict(self.lr_tree.size))

    def _base_namespace(self, reader: Reader, salt: str) -> Namespace:
        if self.mode is SharingMode.NON_SHARED:
            return (salt, "role", reader.digest)
        if self.mode is SharingMode.BASE_LR_SHARED:
            return (salt, "shared A", self.a_digest)
        return (salt, "common")

    def _lr_namespace(self, lease: Lease) -> Namespace:
        return (lease.salt, "role", lease.reader.digest)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot is free, in a tree or in one lease, and only in one of them, and
        every lock belongs to a lease."""
        held = [(lease.base_slots, lease.committed, lease.node) for lease in self._leases]
        sides = [(self.base_pool, self.base_tree, held)]
        if self.own_residuals:
            held = [(lease.lr_slots, lease.lr_committed, lease.lr_node) for lease in self._leases]
            sides.append((self.lr_pool, self.lr_tree, held))
        for pool, tree, held in sides:
            pool.check_integrity()
            tree.check_integrity([node for _, _, node in held])
            private = [slots[committed:] for slots, committed, _ in held]
            everywhere = np.concatenate([pool.free_slots(), tree.all_slots(), *private])
            assert np.array_equal(np.sort(everywhere), np.arange(pool.size)), "a slot was lost or has two owners"
            for slots, committed, node in held:
                assert np.array_equal(tree.path_slots(node), slots[:committed]), "a lease and its path disagree"


def _obtainable(pool: SlotPool, tree: RadixTree) -> int:
    return pool.free_count + tree.size - tree.locked_size


def _allocate(pool: SlotPool, tree: RadixTree, held: Slots, length: int, roomy: int) -> tuple[Slots, int]:
    """Slots that follow `held`, up to `roomy` if so many are free, else up to `length`; and how many were evicted."""
    evicted = 0
    needed = length - len(held)
    if pool.free_count < needed:
        gone = tree.evict(max(needed - pool.free_count, pool.size // 64))
        pool.free(gone)
        evicted = len(gone)
    wanted = roomy - len(held)
    after = int(held[-1]) if len(held) else None
    return pool.allocate(wanted if pool.free_count >= wanted else needed, after), evicted


__all__ = ["CacheCounters", "Lease", "OutOfSlotsError", "Reader", "RoleCache"]
