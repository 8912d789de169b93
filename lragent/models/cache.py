"""Where converted models and digests are kept between runs: `$LRAGENT_CACHE`, else `~/.cache/lragent`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from lragent.atomic import write_file
from lragent.errors import UserError

_SMALL_FILE_BYTES = 16 << 20
"""Digests of smaller files are computed anew each time: that costs less than a file in the cache."""


def cache_root() -> Path:
    """The cache's folder, which need not exist yet."""
    root = os.environ.get("LRAGENT_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "lragent"


def remember(kind: str, path: Path, compute: Callable[[], dict[str, str]]) -> dict[str, str]:
    """`compute()`, remembered for the file `path` as long as its place, size and time of change stay.

    `kind` keeps different facts about one file apart. A cache that cannot be written is done without.
    """
    facts = path.stat()
    if facts.st_size < _SMALL_FILE_BYTES:
        return compute()
    identity = json.dumps([kind, str(path.resolve()), facts.st_size, facts.st_mtime_ns])
    place = cache_root() / "digests" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    try:
        stored = json.loads(place.read_bytes())
        if isinstance(stored, dict):
            return stored
    except (OSError, ValueError):
        pass
    value = compute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_file(place, json.dumps(value).encode())
    except (OSError, UserError):
        pass
    return value
