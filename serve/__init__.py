"""Serving. `from lragent.serve import Engine` for an engine in this process; it is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent.serve.local import Engine as Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lragent.serve.local import Engine

    return Engine
