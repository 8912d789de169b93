"""Which replica holds the cache of a prompt: found by the longest prompt before that this one begins with.

A trajectory grows, so each of its prompts begins with the one before, and nobody need tell which trajectory it is. What
is remembered are hashes: a wrong guess would cost a prefill, never a wrong answer.
"""

from __future__ import annotations

import hashlib
import secrets
from bisect import bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

REMEMBERED = 65_536
"""Prompts whose replica is known."""
WORTH_TOKENS = 2048
"""A prefix of so many tokens is worth keeping to its replica even where others have gone on from it already."""
_AT_ONCE = 256
"""Lengths that are looked up together: one by one, numpy's numbers take most of the time."""


@dataclass(frozen=True)
class Load:
    """How busy a replica is. seats: requests that it runs at once."""

    open: int
    seats: int

    @property
    def full(self) -> bool:
        """Whether one more request would have to wait."""
        return self.open >= self.seats


@dataclass
class _Known:
    replica: int
    followed: bool = False
    """Whether another prompt has begun with this one."""


class Affinity:
    """Sends every prompt to a replica. Not thread-safe.

    - A prompt that goes on from a known one goes to its replica, as long as that has a seat, or nobody has.
    - Where another prompt has gone on from the same one, this is a branch. It is treated as a new trajectory unless
      `WORTH_TOKENS` are shared: else a system prompt that was once asked by itself would draw all trajectories to one
      replica.
    - A new trajectory goes to the replica with the fewest open requests; among equals, to the one that was given the
      fewest trajectories.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._known: OrderedDict[int, _Known] = OrderedDict()
        """By hash; the least recently used first."""
        self._length_of: dict[int, int] = {}
        self._lengths: list[int] = []
        """Of known prompts, each once, in order."""
        self._counts: Counter[int] = Counter()
        self._given: Counter[int] = Counter()
        self._random = np.random.Generator(np.random.PCG64(secrets.randbits(64)))
        self._factors = np.zeros(0, np.uint64)

    def choose(self, salt: str, ids: npt.NDArray[np.int32], loads: Mapping[int, Load]) -> int:
        """The replica, a key of `loads`, for the prompt `ids` [P] of the tenant `salt`; and remember it.

        loads: of all replicas that are there: what others have held is gone.
        """
        hashes = self._prefix_hashes(salt, ids)
        length, known = self._longest(hashes, loads)
        if known is not None and self._keeps(known, length, len(ids), loads):
            chosen = known.replica
        else:
            chosen = min(loads, key=lambda each: (loads[each].open, self._given[each], each))
            self._given[chosen] += 1
        if known is not None and length < len(ids):
            known.followed = True
        if len(ids):
            self._remember(int(hashes[-1]), len(ids), chosen)
        return chosen

    def lost_one(self) -> None:
        """A replica has gone, and its cache with it: `loads` has it no more, and its number is not used again.

        What it held is dropped where a prompt comes upon it, or as the least recently used: everybody would wait while
        tens of thousands were dropped at once.
        """
        self._given.clear()  # else the one that takes its place would be given all new trajectories for a while

    def check_integrity(self) -> None:
        """Raise AssertionError unless all that is kept fits together and is bounded."""
        assert len(self._known) <= self._remembered
        assert self._known.keys() == self._length_of.keys()
        assert Counter(self._length_of.values()) == self._counts
        assert self._lengths == sorted(self._counts)

    @staticmethod
    def _keeps(known: _Known, length: int, whole: int, loads: Mapping[int, Load]) -> bool:
        """Whether a prompt of `whole` tokens goes where the prompt `known`, its first `length` tokens, has gone."""
        if known.followed and length < min(whole, WORTH_TOKENS):
            return False
        return not loads[known.replica].full or all(load.full for load in loads.values())

    def _longest(self, hashes: npt.NDArray[np.uint64], there: Container[int]) -> tuple[int, _Known | None]:
        """The longest known prompt among the prefixes that a replica of those `there` holds, and its length. Longer
        ones, which replicas held that have gone, are dropped: they would hide it."""
        found: tuple[int, _Known | None] = 0, None
        gone: list[int] = []
        for length, name in self._prefixes(hashes):
            known = self._known.get(name)
            if known is None:
                continue
            if known.replica in there:
                found = length, known
                break
            gone.append(name)
        for name in gone:
            self._drop(name)
        return found

    def _prefixes(self, hashes: npt.NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        """Length and name of each prefix that may be known, the longest first."""
        end = bisect_right(self._lengths, len(hashes))
        while end > 0:
            lengths = self._lengths[max(0, end - _AT_ONCE) : end]
            names = hashes[np.array(lengths) - 1].tolist()
            yield from zip(reversed(lengths), reversed(names), strict=True)
            end -= len(lengths)

    def _remember(self, name: int, length: int, replica: int) -> None:
        before = self._known.get(name)
        if before is not None:
            before.replica = replica
            self._known.move_to_end(name)
            return
        self._known[name] = _Known(replica)
        self._length_of[name] = length
        if not self._counts[length]:
            insort(self._lengths, length)
        self._counts[length] += 1
        while len(self._known) > self._remembered:
            self._drop(next(iter(self._known)))

    def _drop(self, name: int) -> None:
        length = self._length_of.pop(name)
        del self._known[name]
        self._counts[length] -= 1
        if not self._counts[length]:
            del self._counts[length]
            del self._lengths[bisect_right(self._lengths, length) - 1]

    def _prefix_hashes(self, salt: str, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """[P], of every prefix: sums of the ids by random factors, modulo 2^64, which take one pass."""
        if len(ids) > len(self._factors):
            more = max(len(ids), 2 * len(self._factors)) - len(self._factors)
            self._factors = np.append(self._factors, self._random.integers(0, 2**64, more, np.uint64))
        start = np.uint64(int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big"))
        products = (ids.astype(np.uint64) + np.uint64(1)) * self._factors[: len(ids)]
        return np.cumsum(products, dtype=np.uint64) + start
