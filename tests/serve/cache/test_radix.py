"""RadixTree against a flat dictionary: every prefix of every inserted path, and its slot."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lragent.serve.cache.elements import Kinds
from lragent.serve.cache.radix import Node, RadixTree

Path = tuple[tuple[int, int], ...]
NAMES = (("one",), ("two",))
PATHS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=9).map(tuple)


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def prefixes(path: Path) -> list[Path]:
    return [path[:n] for n in range(1, len(path) + 1)]


class RadixMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[tuple[tuple[str, ...], Path], int] = {}
        self.locked: list[tuple[tuple[str, ...], Path, Node | None]] = []
        self.fresh = itertools.count()
        self.now = itertools.count()
        self.idle: set[int] = set()  # as the tree has told it
        self.tree = RadixTree(self.told)

    def told(self, slots: np.ndarray, by: int) -> None:
        some = set(slots.tolist())
        assert some.isdisjoint(self.idle) if by > 0 else some <= self.idle
        self.idle = self.idle | some if by > 0 else self.idle - some

    def insert_path(self, name: tuple[str, ...], path: Path, start: int = 0, below: Node | None = None) -> Node | None:
        """Hand in the elements from `start` on, which lie below the node `below`."""
        offered = [next(self.fresh) for _ in path[start:]]
        whole = prefixes(path)[start:]
        expected = [self.entries.setdefault((name, p), s) for p, s in zip(whole, offered, strict=True)]
        tokens, tags = ints(t for t, _ in path[start:]), ints(g for _, g in path[start:])
        owned, node = self.tree.insert(name, tokens, tags, ints(offered), next(self.now), below)
        assert owned.tolist() == expected
        return node

    @rule(name=st.sampled_from(NAMES), path=PATHS)
    def insert(self, name: tuple[str, ...], path: Path) -> None:
        self.insert_path(name, path)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), more=PATHS, hold=st.booleans())
    def prolong(self, data: st.DataObject, more: Path, hold: bool) -> None:
        name, path = data.draw(st.sampled_from(sorted(self.entries)))
        node = self.insert_path(name, path + more)
        if hold:
            self.tree.lock(node)
            self.locked.append((name, path + more, node))

    @precondition(lambda self: self.locked)
    @rule(data=st.data(), more=PATHS)
    def grow_what_is_held(self, data: st.DataObject, more: Path) -> None:
        """As a running sequence hands in chunk after chunk."""
        at = data.draw(st.integers(0, len(self.locked) - 1))
        name, path, held = self.locked[at]
        node = self.insert_path(name, path + more, len(path), held)
        self.tree.lock(node, above=held)
        self.locked[at] = (name, path + more, node)

    @rule(
        name=st.sampled_from(NAMES),
        tokens=st.lists(st.integers(0, 2), max_size=12),
        readable=st.sets(st.integers(0, 1)),
        own_from=st.integers(0, 12),
        hold=st.booleans(),
    )
    def match(self, name: tuple[str, ...], tokens: list[int], readable: set[int], own_from: int, hold: bool) -> None:
        """From `own_from` on only tag 0 may be read."""

        def may_read(position: int, tag: int) -> bool:
            return tag in readable and (position < own_from or tag == 0)

        def accept(start: int, tags: np.ndarray, kinds: Kinds) -> np.ndarray:
            return np.array([may_read(start + i, int(tag)) for i, tag in enumerate(tags)], dtype=bool)

        longest: set[Path] = {()}
        for position, token in enumerate(tokens):
            tags = [tag for tag in (0, 1) if may_read(position, tag)]
            grown = {(*p, (token, tag)) for p in longest for tag in tags if (name, (*p, (token, tag))) in self.entries}
            if not grown:
                break
            longest = grown
        length = self.tree.measure(name, ints(tokens), accept)
        slots, tags, node = self.tree.match(name, ints(tokens), accept, next(self.now), 0)
        assert length == len(slots)
        path = tuple(zip(tokens, tags.tolist(), strict=False))
        assert path in longest
        assert slots.tolist() == [self.entries[name, p] for p in prefixes(path)]
        assert (node is None) == (path == ())
        if hold:
            self.tree.lock(node)
            self.locked.append((name, path, node))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.tree.unlock(self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))[2])

    @rule(count=st.integers(0, 20))
    def evict(self, count: int) -> None:
        held = {(name, p) for name, path, _ in self.locked for p in prefixes(path)}
        taken = self.tree.evict(count).tolist()
        assert len(taken) == min(count, len(self.entries) - len(held))
        gone = {key for key, slot in self.entries.items() if slot in set(taken)}
        assert len(gone) == len(taken)
        assert not gone & held, "a locked entry was evicted"
        for key in gone:
            del self.entries[key]
        assert all(path[:-1] == () or (name, path[:-1]) in self.entries for name, path in self.entries)

    @invariant()
    def equals_the_model(self) -> None:
        self.tree.check_integrity([node for _, _, node in self.locked])
        held = {(name, p) for name, path, _ in self.locked for p in prefixes(path)}
        assert self.idle == {slot for key, slot in self.entries.items() if key not in held}
        assert self.tree.idle_size == len(self.idle)
        assert sorted(self.tree.all_slots().tolist()) == sorted(self.entries.values())
        for name, path, node in self.locked:
            assert self.tree.path_slots(node).tolist() == [self.entries[name, p] for p in prefixes(path)]

    def teardown(self) -> None:
        while self.locked:
            self.tree.unlock(self.locked.pop()[2])
        assert self.tree.locked_size == 0
        assert len(self.tree.evict(self.tree.size)) == len(self.entries)
        assert self.tree.size == 0
        self.tree.check_integrity([])


TestRadixTree = RadixMachine.TestCase
TestRadixTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def everything(_: int, tags: np.ndarray, __: Kinds) -> np.ndarray:
    return np.ones(len(tags), dtype=bool)


def put(tree: RadixTree, tokens: list[int], first_slot: int, now: int = 0) -> Node | None:
    slots = ints(range(first_slot, first_slot + len(tokens)))
    return tree.insert(NAMES[0], ints(tokens), ints([0] * len(tokens)), slots, now)[1]


def test_the_longest_unused_goes_first_and_its_end_before_its_beginning() -> None:
    tree = RadixTree()
    put(tree, [1, 2, 3], 10, now=1)
    put(tree, [4, 5, 6], 20, now=2)
    put(tree, [7, 8, 9], 30, now=3)
    tree.match(NAMES[0], ints([1, 2, 3]), everything, 4, 0)
    assert tree.oldest() == 2
    assert tree.evict(2).tolist() == [21, 22]
    assert tree.evict(2).tolist() == [20, 32]
    assert tree.evict(9).tolist() == [30, 31, 10, 11, 12]


def test_a_parent_goes_after_its_last_child() -> None:
    tree = RadixTree()
    put(tree, [1, 2, 3, 4], 10)
    put(tree, [1, 2, 5], 20)  # slots 20, 21 stay the caller's
    assert tree.evict(2).tolist() == [12, 13]
    assert tree.evict(2).tolist() == [22, 11]
    assert tree.size == 1


def test_a_path_that_grows_in_steps_stays_one_node() -> None:
    """Or a conversation of a thousand turns would be matched in a thousand steps."""
    tree = RadixTree()
    held = None
    for length in range(1, 50):
        node = put(tree, list(range(length)), 100)
        tree.lock(node)
        tree.unlock(held)
        held = node
    tree.unlock(held)
    assert sum(1 for _ in tree._nodes()) == 1
    slots, _, end = tree.match(NAMES[0], ints(range(49)), everything, 0, 0)
    assert end is held
    assert slots.tolist() == list(range(100, 149))


def test_a_held_path_that_grew_in_chunks_is_one_node_when_it_is_let_go() -> None:
    tree = RadixTree()
    held = None
    for chunk in range(10):
        tokens = ints(range(5 * chunk, 5 * chunk + 5))
        _, node = tree.insert(NAMES[0], tokens, 0 * tokens, 100 + tokens, chunk, held)
        tree.lock(node, above=held)
        held = node
    assert tree.locked_size == 50
    tree.unlock(held)
    assert sum(1 for _ in tree._nodes()) == 1
    assert tree.path_slots(held).tolist() == list(range(100, 150))


def test_times_are_not_mixed() -> None:
    """The beginning that was used goes last, however the rest of its path was joined to it."""
    tree = RadixTree()
    put(tree, [1, 2, 3, 4], 10, now=1)
    put(tree, [7, 8], 20, now=2)
    _, _, beginning = tree.match(NAMES[0], ints([1, 2]), everything, 3, 0)
    tree.lock(beginning)
    tree.unlock(beginning)
    assert tree.evict(2).tolist() == [12, 13]
    assert tree.evict(2).tolist() == [20, 21]
    assert tree.evict(2).tolist() == [10, 11]


def test_outdated_notes_on_idle_leaves_do_not_pile_up() -> None:
    tree = RadixTree()
    for first in range(10):
        put(tree, [first, 0, 0], 10 * first)
    for _ in range(500):
        _, _, node = tree.match(NAMES[0], ints([3, 0, 0]), everything, 0, 0)
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._idle) < 200
    tree.check_integrity([])
