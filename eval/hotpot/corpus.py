"""What AutoAct's tools once found, as passages to be found again without a network.

Observations of the environment about the agent are left out: errors, and above all whether an answer was right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lragent.train.autoact import steps_in

_SEARCHES = ("BingSearch", "Retrieve", "Lookup", None)
"""After any other tool the environment speaks of the answer. Of some actions the tool cannot be read (None)."""

_VERDICT = re.compile(
    r"\banswer (is|was|maybe|may be) (in)?(correct|wrong|right)\b|\breflect your answer\b", re.IGNORECASE
)
_ERROR = re.compile(
    r"bing ?search error|invalid action|could not find (that page|\[)|no (more )?results\W*$|the last page \w+ was not",
    re.IGNORECASE,
)
_RESULT = re.compile(r"\(Result \d+/\d+\)\s*")


@dataclass(frozen=True)
class Passage:
    """A text, and the names by which Retrieve found it (none where another tool did)."""

    text: str
    names: tuple[str, ...] = ()


def passages_of(rows: Iterable[Mapping[str, Any]]) -> list[Passage]:
    """The passages of AutoAct's rows, each once, in the order of their first appearance.

    What lies wholly within another passage is no passage of its own; that one has its names as well.
    """
    names: dict[str, list[str]] = {}
    for row in rows:
        for step in steps_in(row["prompt"]):
            text = " ".join(_RESULT.sub("", step.observation, count=1).split())
            if step.tool not in _SEARCHES or not text or _ERROR.match(text) or _VERDICT.search(text):
                continue
            known = names.setdefault(text, [])
            if step.tool == "Retrieve" and step.argument and step.argument not in known:
                known.append(step.argument)
    for text in sorted(names, key=len):
        whole = next((other for other in names if len(other) > len(text) and text in other), None)
        if whole is not None:
            names[whole] += [name for name in names.pop(text) if name not in names[whole]]
    return [Passage(text, tuple(found)) for text, found in names.items()]
