"""Remembers which ids a turn's text was generated as, so that text sent back by a client costs no cache miss."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Container, Sequence

import numpy as np

ContextKey = tuple[str, bytes]
"""Names a context: its tenant's salt, and a digest of its ids."""


class ContextKeys:
    """The keys of one tenant's context as it grows turn by turn: each costs what is new, not the whole context."""

    def __init__(self, salt: str) -> None:
        self._salt = salt
        self._digest = hashlib.blake2b(digest_size=16)
        self._length = 0

    def of(self, context: list[int]) -> ContextKey:
        """The key of `context`, which must begin with the context of the call before."""
        self._digest.update(np.array(context[self._length :], np.int64).tobytes())
        self._length = len(context)
        return self._salt, self._digest.digest()


class TurnMemory:
    """A bounded memory from (context before the turn, text of the turn) to the generated ids.

    Used by the engine's thread and by those that prepare prompts.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._turns: OrderedDict[tuple[ContextKey, str], bytes] = OrderedDict()
        """Ids as 32-bit numbers: a tuple of Python's takes ten times as much, and there are many turns."""
        self._lock = threading.Lock()

    def remember(self, context: ContextKey, text: str, ids: tuple[int, ...]) -> None:
        """`text` was generated as `ids` (without the end-of-turn token) after `context`."""
        key = (context, text)
        with self._lock:
            self._turns[key] = np.array(ids, np.int32).tobytes()
            self._turns.move_to_end(key)
            while len(self._turns) > self._capacity:
                self._turns.popitem(last=False)

    def remember_turn(self, context: ContextKey, text: str, generated: Sequence[int], ends: Container[int]) -> None:
        """The same for all that was `generated`; `ends` are the tokens that end a turn."""
        turn = generated[:-1] if generated and generated[-1] in ends else generated
        self.remember(context, text, tuple(turn))

    def recall(self, context: ContextKey, text: str) -> list[int] | None:
        """The ids that `text` was generated as, or None."""
        key = (context, text)
        with self._lock:
            ids = self._turns.get(key)
            if ids is None:
                return None
            self._turns.move_to_end(key)
            recalled: list[int] = np.frombuffer(ids, np.int32).tolist()
            return recalled
