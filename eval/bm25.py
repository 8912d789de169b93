"""BM25 over a fixed list of texts, for the tools that search."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import bm25s
import numpy as np


class Index:
    """Read-only after construction, and safe to use from several threads."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._count = len(texts)
        words = [_words(text) for text in texts]
        self._index = bm25s.BM25()
        if any(words):  # bm25s makes no index of nothing
            self._index.index(words, show_progress=False)
        self._known = frozenset(word for text in words for word in text)

    def scores(self, query: str) -> np.ndarray:
        """[texts], float32: the score of each text; zeros where no word of `query` is in any."""
        known = [word for word in _words(query) if word in self._known]
        return self._index.get_scores(known) if known else np.zeros(self._count, np.float32)

    def best(self, query: str, count: int = 1) -> list[int]:
        """Up to `count` texts that share a word with `query`, by falling score; of equals the earlier first."""
        scores = self.scores(query)
        return [int(at) for at in np.argsort(-scores, kind="stable")[:count] if scores[at] > 0]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", html.unescape(text).lower())
