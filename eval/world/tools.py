"""The agent's tools: Search over all pages (BM25), Lookup inside the page found last, Finish."""

import re

import numpy as np

from lragent.eval.agent import FINISH
from lragent.eval.bm25 import Index
from lragent.eval.world.pages import Page, World

SEARCH, LOOKUP = "Search", "Lookup"
TOOLS = (SEARCH, LOOKUP, FINISH)

_TITLE_WEIGHT = 3.0
"""How much a word in the title counts against one in the text: enough that a page beats those that only mention it."""


class Library:
    """The pages of a world, searchable. Read-only after construction; shared by any number of `Desk`s."""

    def __init__(self, world: World, excerpt: int) -> None:
        """`excerpt`: how many sentences Search shows of a page."""
        self.excerpt = excerpt
        self._pages = list(world.pages.values())
        self._titles = Index([page.title for page in self._pages])
        self._texts = Index([page.text for page in self._pages])

    def best(self, query: str) -> Page | None:
        """The page with the highest BM25 score, the earlier one in a tie; None when no word of the query is known."""
        scores = _TITLE_WEIGHT * self._titles.scores(query) + self._texts.scores(query)
        best = int(np.argmax(scores))
        return self._pages[best] if scores[best] > 0 else None


class Desk:
    """The tools as one trajectory uses them: remembers the page found last and how far Lookup has read."""

    tools = TOOLS

    def __init__(self, library: Library) -> None:
        self._library = library
        self._page: Page | None = None
        self._keyword = ""
        self._next = 0

    def call(self, tool: str, argument: str) -> str:
        """What `Search` or `Lookup` answers. Never raises on what a model wrote: it says what is wrong."""
        argument = argument.strip()
        if not argument:
            return f"{tool} needs an argument."
        return self._search(argument) if tool == SEARCH else self._lookup(argument)

    def _search(self, query: str) -> str:
        page = self._library.best(query)
        if page is None:
            return "No page found."
        self._page, self._keyword = page, ""
        shown = page.sentences[: self._library.excerpt]
        more = " ..." if len(shown) < len(page.sentences) else ""
        return f"{page.title}: {' '.join(shown)}{more}"

    def _lookup(self, keyword: str) -> str:
        if self._page is None:
            return "Search for a page first."
        if keyword.lower() != self._keyword:
            self._keyword, self._next = keyword.lower(), 0
        pattern = re.compile(rf"(?<!\w){re.escape(self._keyword)}(?!\w)", re.IGNORECASE)
        for i in range(self._next, len(self._page.sentences)):
            if pattern.search(self._page.sentences[i]):
                self._next = i + 1
                return self._page.sentences[i]
        self._next = len(self._page.sentences)
        return "No more results."
