"""The little Markdown that sections of a report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every row has a cell for each of `heads`."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def image(words: str, path: Path) -> str:
    """A link to a picture from a page that lies beside the picture's folder."""
    return f"![{words}]({path.parent.name}/{path.name})"
