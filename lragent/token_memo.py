"""The ids of texts that were tokenised lately.

A conversation comes back whole at every turn; only its last messages are new.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

KEPT = 1 << 24
"""Characters of the texts whose ids are kept: with the ids, some 40 MB."""


class TokenMemo:
    """Tokenises texts, each once while it is remembered; the least recently used are forgotten. Thread-safe."""

    def __init__(self, tokenise: Callable[[list[str]], Sequence[Sequence[int]]], kept: int = KEPT) -> None:
        """tokenise: the ids of each text; called by one thread at a time, as tokenizers keep state. kept: characters of
        all texts that are remembered; a longer text is not."""
        self._tokenise, self._kept = tokenise, kept
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._characters = 0

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
        if len(text) > self._kept:
            return
        self._ids[text] = ids
        self._characters += len(text)
        while self._characters > self._kept:
            oldest, _ = self._ids.popitem(last=False)
            self._characters -= len(oldest)
