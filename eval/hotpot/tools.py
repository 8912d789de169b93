"""AutoAct's tools over passages: BingSearch, Retrieve, Lookup, Finish, in the words that the trajectories know."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from lragent.eval.agent import FINISH
from lragent.eval.bm25 import Index
from lragent.eval.hotpot.corpus import Passage

SEARCH, RETRIEVE, LOOKUP = "BingSearch", "Retrieve", "Lookup"
TOOLS = (SEARCH, RETRIEVE, LOOKUP, FINISH)

LONGEST = 1_500
"""Characters of an answer, about what nine of ten observations have: one long page must not fill the context."""
SIMILAR = 5
"""Names that Retrieve offers where it knows no page of that name."""

_NOTHING = "Could not find that page, please try again."
# Snippets were joined without a space, so a sentence also ends before a capital; initials and U.S. end none.
_END = re.compile(r"(?<=[a-z0-9)\]”\"][.!?])\s*(?=[A-Z“\"(\[])")


class Shelf:
    """Passages, searchable. Read-only after construction; shared by any number of `ShelfDesk`s."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = tuple(passages)
        self._texts = Index([" ".join((*passage.names, passage.text)) for passage in self.passages])
        self._by_name: dict[str, Passage] = {}
        self._names: list[str] = []
        for passage in self.passages:
            for name in passage.names:
                if name.lower() not in self._by_name:
                    self._by_name[name.lower()] = passage
                    self._names.append(name)
        self._name_index = Index(self._names)

    def best(self, query: str) -> Passage | None:
        """The passage with the highest BM25 score; None where no word of the query is known."""
        return next((self.passages[at] for at in self._texts.best(query)), None)

    def named(self, name: str) -> Passage | None:
        """The passage that Retrieve found by exactly this name, in any case."""
        return self._by_name.get(name.lower())

    def similar(self, name: str) -> list[str]:
        """Names with a word in common, the closest first."""
        return [self._names[at] for at in self._name_index.best(name, SIMILAR)]


class ShelfDesk:
    """The tools as one trajectory uses them: remembers the passage found last and how far Lookup has read."""

    tools = TOOLS

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._sentences: list[str] | None = None
        self._keyword = ""
        self._read = 0

    def call(self, tool: str, argument: str) -> str:
        """What the tool answers, `LONGEST` characters at most. Never raises on what a model wrote."""
        argument = argument.strip()
        if not argument:
            return f"{tool} needs an argument."
        if tool == LOOKUP:
            return self._lookup(argument)
        passage = self._shelf.best(argument) if tool == SEARCH else self._shelf.named(argument)
        if passage is not None:
            self._sentences, self._keyword, self._read = sentences(passage.text), "", 0
            return _shortened(passage.text)
        similar = self._shelf.similar(argument) if tool == RETRIEVE else []
        return _shortened(f"Could not find [{argument}]. Similar: {similar}") if similar else _NOTHING

    def _lookup(self, keyword: str) -> str:
        if self._sentences is None:
            return "Invalid action. Lookup only follows the Retrieve or BingSearch action."
        if keyword.lower() != self._keyword:
            self._keyword, self._read = keyword.lower(), 0
        found = [sentence for sentence in self._sentences if self._keyword in html.unescape(sentence).lower()]
        if self._read >= len(found):
            return "No More Results" if found else "No Results"
        self._read += 1
        return _shortened(f"(Result {self._read}/{len(found)}) {found[self._read - 1]}")


def sentences(text: str) -> list[str]:
    """The sentences of a passage, in order."""
    return _END.split(text)


def _shortened(text: str) -> str:
    """Up to the last sentence that ends within `LONGEST` characters; a longer first one is cut off."""
    if len(text) <= LONGEST:
        return text
    ends = [match.start() for match in _END.finditer(text) if match.start() <= LONGEST - len(" ...")]
    return text[: ends[-1] if ends else LONGEST - len(" ...")] + " ..."
