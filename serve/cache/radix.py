"""A radix tree over token ids: which cached prefix does a token sequence have, and in which slots.

An element of a path is a token and a tag. In the base tree the tag is the writer of the token's cache, so one token
may be there more than once, written by different roles. In the residual tree it is the serial number of the base entry
that the LR was computed over, so that a residual can never outlive its base entry: a new entry has a new serial.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lragent.serve.cache.elements import Elements, Ints, Kinds, Number, Tokens, kinds_of
from lragent.serve.cache.slots import Slots

Namespace = tuple[str, ...]
Accept = Callable[[int, Ints, Kinds], npt.NDArray[np.bool_]]
"""Of the entries from position `start` on with these tags, of these kinds: which may be read."""
OnIdle = Callable[[Slots, int], None]

NO_SLOTS: Slots = np.empty(0, np.int32)
NO_TAGS: Ints = np.empty(0, np.int64)


@dataclass(eq=False)
class Node:
    """A run of elements without a branch.

    `locks` counts the leases that end at this node or below it; a locked node is never evicted.
    """

    elements: Elements
    parent: Node | None
    children: dict[int, list[Node]] = field(default_factory=dict)
    locks: int = 0
    last_used: int = 0
    last_found: int = 0
    """When a request found it last; 0 where it was only written."""
    readers: frozenset[int] = frozenset()
    """Whose requests have found it, by their writers' tags."""

    @property
    def tokens(self) -> Tokens:
        """For reading only, as `tags` and `slots`."""
        return self.elements.tokens

    @property
    def tags(self) -> Ints:
        """See RadixTree."""
        return self.elements.tags

    @property
    def slots(self) -> Slots:
        """One per element."""
        return self.elements.slots

    def __len__(self) -> int:
        return len(self.elements)


@dataclass(eq=False)
class Root(Node):
    """Holds no elements; its children begin the paths of one namespace."""

    namespace: Namespace = ()


class RadixTree:
    """Owns the slots that are in it, and nothing else: whoever takes slots out (evict) frees them in their pool.

    Time is told by the caller (`now`, never decreasing), so that several trees can be compared by it. on_idle: told of
    slots that nobody locks any more (+1), and of such slots that are locked or leave the tree (-1).
    """

    def __init__(self, on_idle: OnIdle | None = None) -> None:
        self._roots: dict[Namespace, Root] = {}
        self._on_idle = on_idle
        self._order = itertools.count()
        # A heap of (last_used, breaks ties, leaf) that holds every unlocked leaf. Outdated entries are put right when
        # they are popped, so that neither a match nor a lock has to look for them.
        self._idle: list[tuple[int, int, Node]] = []
        self._idle_limit = 64
        self.size = 0
        """Elements in all namespaces together, which is the number of slots that the tree owns."""
        self.locked_size = 0
        """Elements that cannot be evicted now."""

    @property
    def idle_size(self) -> int:
        """Elements that can be evicted now."""
        return self.size - self.locked_size

    def match(
        self, namespace: Namespace, tokens: Tokens, accept: Accept, now: int, reader: int
    ) -> tuple[Slots, Ints, Node | None]:
        """The longest cached prefix of `tokens` whose entries may be read.

        Returns its slots and its tags, for reading only, and the node that ends exactly there (None: nothing matched).
        Marks the path as used, and as found by `reader`; splits a node where the match ends inside it; changes nothing
        else. The node stays valid until the next `evict` or `unlock` unless it is locked.
        """
        root = self._roots.get(namespace)
        if root is None:
            return NO_SLOTS, NO_TAGS, None
        end, length = self._longest(root, 0, tokens, accept)
        if end is root:
            return NO_SLOTS, NO_TAGS, None
        depth = self._depth(end)
        if length < depth:
            end = self._split(end, len(end) - (depth - length))
        self.touch(end, now)
        for each in self._path(end):
            each.last_found = now
            if reader not in each.readers:
                each.readers |= {reader}
        tags = _joined([each.tags for each in self._path(end)][::-1], NO_TAGS)
        return self.path_slots(end), tags, end

    def idle_not_found_since(self, when: int) -> int:
        """Elements that can be evicted now and that no request has found since `when`."""
        return sum(len(node) for _, node in self._nodes() if not node.locks and node.last_found < when)

    def measure(self, namespace: Namespace, tokens: Tokens, accept: Accept) -> int:
        """How long `match` would be; changes nothing."""
        root = self._roots.get(namespace)
        return 0 if root is None else self._longest(root, 0, tokens, accept)[1]

    def _longest(self, node: Node, position: int, tokens: Tokens, accept: Accept) -> tuple[Node, int]:
        """The deepest readable match at or below `node`, whose own elements end at `position`."""
        best = (node, position)
        stack = [(node, position)]
        while stack:
            parent, start = stack.pop()
            if start == len(tokens):
                continue
            for child in parent.children.get(int(tokens[start]), ()):
                ahead = tokens[start : start + len(child)]
                good = child.tokens[: len(ahead)] == ahead
                good &= accept(start, child.tags[: len(ahead)], child.elements.kinds)
                length = len(good) if good.all() else int(good.argmin())
                if length == 0:
                    continue
                if start + length > best[1]:
                    best = (child, start + length)
                if length == len(child):
                    stack.append((child, start + length))
        return best

    def insert(
        self, namespace: Namespace, tokens: Tokens, tags: Ints, slots: Slots, now: int, below: Node | None = None
    ) -> tuple[Slots, Node | None]:
        """Put a path into the tree, which takes ownership of the slots it did not know, and mark it as used.

        below: a locked node of that namespace whose path the new elements prolong; None: they begin at the root.
        Returns the slots of these elements as the tree has them (where it had an element already, its own slot: the
        caller keeps the slot it offered) and the node at the path's end.
        """
        if not len(tokens):
            return slots, below
        node: Node = below or self._roots.setdefault(namespace, _root(namespace))
        owned = slots.copy()
        at = 0
        while at < len(tokens):
            child, length = self._exact_child(node, tokens[at:], tags[at:])
            if child is None:
                child = Node(Elements(tokens[at:], tags[at:], slots[at:], kinds_of(tags[at:])), node)
                node.children.setdefault(int(tokens[at]), []).append(child)
                self.size += len(child)
                self._tell([child], 1)
                length = len(child)
            elif length < len(child):
                child = self._split(child, length)
            owned[at : at + length] = child.slots
            node, at = child, at + length
        self.touch(node, now)
        self._note_idle(node)
        return owned, node

    def _exact_child(self, node: Node, tokens: Tokens, tags: Ints) -> tuple[Node | None, int]:
        for child in node.children.get(int(tokens[0]), ()):
            if child.tags[0] == tags[0]:
                length = min(len(child), len(tokens))
                same = (child.tokens[:length] == tokens[:length]) & (child.tags[:length] == tags[:length])
                return child, length if same.all() else int(same.argmin())
        return None, 0

    def lock(self, node: Node | None, above: Node | None = None) -> None:
        """Keep the path that ends at `node` until `unlock` with the same node. None is the empty path.

        above: a node on that path whose lock is moved down to `node`: one `unlock`, of `node`, ends both.
        """
        fresh = []
        for each in self._path(node):
            if each is above:
                break
            if not each.locks:
                fresh.append(each)
                self.locked_size += len(each)
            each.locks += 1
        self._tell(fresh, -1)

    def unlock(self, node: Node | None) -> None:
        """Undo one `lock`. Joins what needs no border any more, so that a path that grew in steps is one node again."""
        if node is None:
            return
        free = []
        for each in self._path(node):
            assert each.locks > 0, "unlock without lock"
            each.locks -= 1
            if not each.locks:
                free.append(each)
                self.locked_size -= len(each)
        self._tell(free, 1)
        self._note_idle(self._join(node))

    def _join(self, node: Node) -> Node:
        """Make one of `node` and what lies above and below it without a border. The lowest remains: it is returned."""
        while (lower := _only(node)) is not None and _borderless(node, lower):
            node = lower
        chain = [node]
        while (upper := chain[-1].parent) is not None and _borderless(upper, chain[-1]):
            chain.append(upper)
        if len(chain) > 1:
            top = chain[-1]
            assert top.parent is not None
            siblings = top.parent.children[int(top.tokens[0])]
            siblings[siblings.index(top)] = node
            for each in chain[-2::-1]:
                top.elements.prolong(each.elements)
            node.elements, node.parent = top.elements, top.parent
            node.last_found = max(each.last_found for each in chain)
            node.readers = frozenset().union(*(each.readers for each in chain))
            for each in chain[1:]:
                each.parent = None
        return node

    def oldest(self) -> int | None:
        """When the leaf that `evict` would take first was used last; None where all is locked."""
        leaf = self._pop_idle()
        if leaf is None:
            return None
        self._note_idle(leaf)
        return leaf.last_used

    def evict_from_oldest(self, most: int) -> Slots:
        """Take up to `most` slots out of the unlocked leaf that was not used for the longest time; none if there is
        none.

        Its end goes before its beginning, so that a prefix stays usable. The caller frees the slots.
        """
        leaf = self._pop_idle() if most > 0 else None
        if leaf is None:
            return NO_SLOTS
        keep = max(0, len(leaf) - most)
        taken = leaf.slots[keep:]
        self.size -= len(taken)
        if self._on_idle is not None:
            self._on_idle(taken, -1)
        if keep:
            leaf.elements = leaf.elements.part(0, keep)
            self._note_idle(leaf)
        else:
            self._remove(leaf)
        return taken

    def evict(self, count: int) -> Slots:
        """Take `count` slots out of the tree, or all that are unlocked if they are fewer, the longest unused first.

        The caller frees the slots.
        """
        taken: list[Slots] = []
        missing = count
        while len(some := self.evict_from_oldest(missing)):
            taken.append(some)
            missing -= len(some)
        return _joined(taken, NO_SLOTS)

    def _tell(self, nodes: list[Node], by: int) -> None:
        if self._on_idle is not None and nodes:
            self._on_idle(_joined([node.slots for node in nodes], NO_SLOTS), by)

    def _note_idle(self, node: Node) -> None:
        """Remember `node` as one that `evict` may take, if it is."""
        if node.locks or node.children:
            return
        heapq.heappush(self._idle, (node.last_used, next(self._order), node))
        if len(self._idle) > self._idle_limit:  # most of it may be outdated
            self._idle = [(leaf.last_used, next(self._order), leaf) for leaf in self._leaves() if not leaf.locks]
            heapq.heapify(self._idle)
            self._idle_limit = 64 + 2 * len(self._idle)

    def _pop_idle(self) -> Node | None:
        """The unlocked leaf that was not used for the longest time."""
        while self._idle:
            last_used, _, leaf = heapq.heappop(self._idle)
            if leaf.parent is None or leaf.children or leaf.locks:
                continue
            if leaf.last_used == last_used:
                return leaf
            self._note_idle(leaf)
        return None

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        siblings = parent.children[int(leaf.tokens[0])]
        siblings.remove(leaf)
        if not siblings:
            del parent.children[int(leaf.tokens[0])]
        leaf.parent = None
        if not isinstance(parent, Root):
            self._note_idle(parent)
        elif not parent.children:
            del self._roots[parent.namespace]

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` so that its first `at` elements are a node of their own, which is returned.

        `node` stays the lower part: whoever locked it still holds the whole path.
        """
        assert node.parent is not None
        assert 0 < at < len(node)
        head = node.elements.part(0, at)
        upper = Node(head, node.parent, {}, node.locks, node.last_used, node.last_found, node.readers)
        siblings = node.parent.children[int(node.tokens[0])]
        siblings[siblings.index(node)] = upper
        node.elements = node.elements.part(at, len(node))
        node.parent = upper
        upper.children[int(node.tokens[0])] = [node]
        return upper

    def touch(self, node: Node | None, now: int) -> None:
        """Mark the path that ends at `node` as used."""
        for each in self._path(node):
            each.last_used = now

    @staticmethod
    def _path(node: Node | None) -> Iterator[Node]:
        """From `node` up, without the root."""
        while node is not None and node.parent is not None:
            yield node
            node = node.parent

    def _depth(self, node: Node) -> int:
        return sum(len(each) for each in self._path(node))

    def _nodes(self) -> Iterator[tuple[Namespace, Node]]:
        for name, root in self._roots.items():
            stack = [child for group in root.children.values() for child in group]
            while stack:
                node = stack.pop()
                yield name, node
                stack.extend(child for group in node.children.values() for child in group)

    def _leaves(self) -> Iterator[Node]:
        return (node for _, node in self._nodes() if not node.children)

    def recent(self, most: int) -> tuple[list[tuple[Namespace, Node, int]], bool]:
        """The namespace, node and first position of up to `most` nodes that were used last, each behind what it
        prolongs; and whether these are all."""
        waiting = [
            (-child.last_used, next(self._order), name, child, 0)
            for name, root in self._roots.items()
            for group in root.children.values()
            for child in group
        ]
        heapq.heapify(waiting)
        found: list[tuple[Namespace, Node, int]] = []
        while waiting and len(found) < most:
            _, _, name, node, start = heapq.heappop(waiting)
            found.append((name, node, start))
            for group in node.children.values():
                for child in group:
                    heapq.heappush(waiting, (-child.last_used, next(self._order), name, child, start + len(node)))
        return found, not waiting

    def path_slots(self, node: Node | None) -> Slots:
        """The slots of the whole path that ends at `node`; for reading only."""
        return _joined([each.slots for each in self._path(node)][::-1], NO_SLOTS)

    def all_slots(self) -> Slots:
        """Every slot that the tree owns."""
        return _joined([node.slots for _, node in self._nodes()], NO_SLOTS)

    def idle_slots(self) -> Slots:
        """Every slot that nobody locks."""
        return _joined([node.slots for _, node in self._nodes() if not node.locks], NO_SLOTS)

    def all_tags(self) -> Ints:
        """The tags of all elements, in the order of `all_slots`."""
        return _joined([node.tags for _, node in self._nodes()], NO_TAGS)

    def check_integrity(self, held: list[Node | None]) -> None:
        """Raises AssertionError on a broken link, an ambiguous branch, a shared slot, a wrong count or a wrong lock.

        held: the nodes that are locked, each as often as it is.
        """
        total = locked = 0
        assert all(root.children for root in self._roots.values()), "an empty namespace was kept"
        idle = {id(leaf) for _, _, leaf in self._idle}
        assert all(id(leaf) in idle for leaf in self._leaves() if not leaf.locks), "a free leaf is never evicted"
        locks = Counter(id(each) for node in held for each in self._path(node))
        for _, node in self._nodes():
            assert node.parent is not None
            assert len(node) == len(node.tags) == len(node.slots) > 0, "a node's columns differ in length"
            kinds = node.elements.kinds
            assert kinds is None or set(node.tags.tolist()) <= kinds, "a node has tags that it does not know of"
            assert node in node.parent.children[int(node.tokens[0])], "a node hangs under the wrong token"
            below = [child for group in node.children.values() for child in group]
            heads = {(int(child.tokens[0]), int(child.tags[0])) for child in below}
            assert len(heads) == len(below), "two children begin with the same element"
            assert all(child.parent is node for child in below), "a child names another parent"
            assert node.locks == locks.pop(id(node), 0), "a lock outlived its lease, or is missing"
            total += len(node)
            locked += len(node) if node.locks else 0
        assert not locks, "a locked node has left the tree"
        assert total == self.size, "the tree's size is wrong"
        assert locked == self.locked_size, "the count of locked elements is wrong"
        slots = self.all_slots()
        assert len(np.unique(slots)) == len(slots), "one slot stands in two places"


def _root(namespace: Namespace) -> Root:
    return Root(Elements(np.empty(0, np.int32), NO_TAGS, NO_SLOTS, None), None, namespace=namespace)


def _joined(parts: list[npt.NDArray[Number]], none: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """`parts` end to end; a single one is not copied. none: where there are none."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else none


def _only(node: Node) -> Node | None:
    """The only child of `node`, if it has exactly one."""
    below = list(itertools.islice(itertools.chain.from_iterable(node.children.values()), 2))
    return below[0] if len(below) == 1 else None


def _borderless(upper: Node, lower: Node) -> bool:
    """Whether nothing branches off between the two, no lease ends there, and both were used last at one time: times
    that differ must not be mixed, or what was not used for long would be kept, or what was used be evicted."""
    same = upper.locks == lower.locks and upper.last_used == lower.last_used
    return same and upper.parent is not None and _only(upper) is lower
