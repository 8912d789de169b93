"""Remembers which ids a turn's text was generated as, so that text sent back by a client costs no cache miss."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Context = Sequence[int] | npt.NDArray[np.int64]


class TurnMemory:
    """A bounded memory from (tenant, context before the turn, text of the turn) to the generated ids.

    Used by the engine's thread and by those that prepare prompts.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._turns: OrderedDict[tuple[str, bytes, str], tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, salt: str, context: Context, text: str, ids: tuple[int, ...]) -> None:
        """`text` was generated as `ids` (without the end-of-turn token) after `context`."""
        key = (salt, _digest(context), text)
        with self._lock:
            self._turns[key] = ids
            self._turns.move_to_end(key)
            while len(self._turns) > self._capacity:
                self._turns.popitem(last=False)

    def recall(self, salt: str, context: Context, text: str) -> list[int] | None:
        """The ids that `text` was generated as, or None."""
        key = (salt, _digest(context), text)
        with self._lock:
            ids = self._turns.get(key)
            if ids is None:
                return None
            self._turns.move_to_end(key)
            return list(ids)


def _digest(context: Context) -> bytes:
    return hashlib.blake2b(np.asarray(context, dtype=np.int64).tobytes(), digest_size=16).digest()
