"""A running sequence's hold on the cache, and who asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from lragent.serve.cache.elements import Ints, Tokens
from lragent.serve.cache.radix import Node
from lragent.serve.cache.slots import Slots


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

    `tokens`, `tags`, `base_slots` (and `lr_slots`, where LR entries lie apart, else of length 0) have room for
    `capacity` positions. `length` tokens are filled in, `reserved` (`lr_reserved`) slots. Positions below `committed`
    (`lr_committed`) belong to the trees, which keep them; the slots from there on are the lease's own.
    """

    reader: Reader
    salt: str
    tokens: Tokens
    tags: Ints
    length: int
    prompt: int
    """Positions that were known when the lease was opened."""
    base_reused: int
    """Prompt positions whose base (or full) cache was found."""
    lr_reused: int
    """Prompt positions whose LR cache was found; 0 where values are cached whole."""
    base_slots: Slots
    lr_slots: Slots
    reserved: int
    lr_reserved: int
    committed: int
    lr_committed: int
    node: Node | None
    lr_node: Node | None
    told: int = 0
    """The slots of positions below it are as the device's tables have them. Whoever tells the device raises it; the
    cache lowers it to the first position whose slot it changes."""
    lr_told: int = 0
    """The same of `lr_slots`."""

    @property
    def capacity(self) -> int:
        """How many positions this sequence may ever have."""
        return len(self.tokens)

    def append(self, token: int, tag: int) -> None:
        """One more token, to be processed by the writer `tag`."""
        self.tokens[self.length] = token
        self.tags[self.length] = tag
        self.length += 1
