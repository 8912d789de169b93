"""The elements of a radix tree's node: tokens, tags and slots side by side, prolonged where they lie."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lragent.serve.cache.slots import Slots

Tokens = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
Kinds = frozenset[int] | None

FEW = 64
"""Kinds that are listed at most."""


class Elements:
    """A run of elements: `tokens`, `tags` and `slots`, which are for reading only.

    kinds: the different tags among them, perhaps some more; None where they are too many to be listed, as serial
    numbers are. So the tags of a long run, written by few, need not all be looked at.
    """

    tokens: Tokens
    tags: Ints
    slots: Slots

    def __init__(self, tokens: Tokens, tags: Ints, slots: Slots, kinds: Kinds) -> None:
        """Copies, so that none keeps alive the memory of another."""
        self._rooms: list[npt.NDArray[Any]] = [tokens.copy(), tags.copy(), slots.copy()]
        self.kinds = kinds
        self._show(len(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int) -> Elements:
        """A copy of the elements `[start, end)`."""
        return Elements(self.tokens[start:end], self.tags[start:end], self.slots[start:end], self.kinds)

    def prolong(self, more: Elements) -> None:
        """Put others behind. Costs what they are: all is copied only each time it has grown by half."""
        before, length = len(self), len(self) + len(more)
        if length > len(self._rooms[0]):
            self._rooms = [with_room(length + length // 2, column) for column in self._columns()]
        for room, column in zip(self._rooms, more._columns(), strict=True):
            room[before:length] = column
        self._show(length)
        kinds = None if self.kinds is None or more.kinds is None else self.kinds | more.kinds
        self.kinds = kinds if kinds is not None and len(kinds) <= FEW else None

    def _columns(self) -> tuple[Tokens, Ints, Slots]:
        return self.tokens, self.tags, self.slots

    def _show(self, length: int) -> None:
        self.tokens, self.tags, self.slots = (room[:length] for room in self._rooms)


def kinds_of(tags: Ints) -> Kinds:
    """The different ones among `tags`, if they are few."""
    if len(tags) > FEW:
        changes = np.flatnonzero(tags[1:] != tags[:-1])
        if len(changes) > len(tags) // 2:
            return None
        tags = tags[np.append(changes, len(tags) - 1)]  # one of each run
    kinds = frozenset(tags.tolist())
    return kinds if len(kinds) <= FEW else None


def with_room(capacity: int, *parts: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """A copy of `parts` end to end in an array of `capacity` numbers; those behind are anything."""
    out = np.empty(capacity, parts[0].dtype)
    at = 0
    for part in parts:
        out[at : at + len(part)] = part
        at += len(part)
    return out
