"""The ids of texts that were tokenised lately.

A conversation comes back whole at every turn; only its last messages are new.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

KEPT = 40_000_000
"""Bytes of the texts that are kept, their ids included."""
_ENTRY = 160
"""Bytes that remembering a text takes besides: many short ones must not outgrow the bound."""


class TokenMemo:
    """Tokenises texts, each once while it is remembered; the least recently used are forgotten. Thread-safe."""

    def __init__(self, tokenise: Callable[[list[str]], Sequence[Sequence[int]]], kept: int = KEPT) -> None:
        """tokenise: the ids of each text; called by one thread at a time, as tokenizers keep state. kept: bytes of all
        that is remembered; a text that takes more is not."""
        self._tokenise, self._kept = tokenise, kept
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._bytes = 0

    def __call__(self, texts: Sequence[str]) -> list[array[int]]:
        """The ids of each text. They are shared: not to be changed."""
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in self._ids]
            found = dict(zip(new, (array("i", ids) for ids in self._tokenise(new)), strict=True)) if new else {}
            answer = []
            for text in texts:
                if text not in found:
                    self._ids.move_to_end(text)
                answer.append(found[text] if text in found else self._ids[text])
            for text, ids in found.items():
                self._remember(text, ids)
            return answer

    def _remember(self, text: str, ids: array[int]) -> None:
        size = size_of(text, ids)
        if size > self._kept:
            return
        self._ids[text] = ids
        self._bytes += size
        while self._bytes > self._kept:
            self._bytes -= size_of(*self._ids.popitem(last=False))


def size_of(text: str, ids: array[int]) -> int:
    """Bytes that remembering a text takes."""
    return sys.getsizeof(text) + sys.getsizeof(ids) + _ENTRY
