"""The cache as it is seen from outside: runs of tokens, who wrote them, who has found them, who holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NodeView:
    """One run of a radix tree. `parent` is the id of the run that it prolongs, None at the beginning of a context.

    owner: whose entries these are, a role's digest; "" where several roles share them. start: position of its first
    token. writers: runs of (writer's tag, tokens), in order; () in a tree of LR entries, which their owner wrote.
    readers: the tags of those that a request of theirs has found it for. held: running requests that hold it.
    last_used: in the cache's own time.
    """

    id: int
    parent: int | None
    part: Literal["base", "lr"]
    owner: str
    start: int
    length: int
    writers: tuple[tuple[int, int], ...]
    readers: tuple[int, ...]
    held: int
    last_used: int


@dataclass(frozen=True)
class CacheView:
    """Up to a bound, the runs that were used last, each with all that it prolongs. whole: whether these are all."""

    nodes: tuple[NodeView, ...]
    whole: bool
    now: int
