"""Counters of several engines as those of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from lragent.serve.engine.engine import EngineStats, TokenSums

_NOW = (
    "running", "waiting", "slots_total", "slots_used", "slots_cached", "base_bytes_used", "base_bytes_total",
    "lr_bytes_used", "lr_bytes_total", "role_places",
)  # fmt: skip
"""What an engine that has gone no longer has."""


def counters_of(stats: EngineStats) -> EngineStats:
    """What stays of an engine that has gone: all that only grows."""
    nothing: dict[str, Any] = dict.fromkeys(_NOW, 0)
    return replace(stats, **nothing, running_roles={})


def added(all_stats: Iterable[EngineStats]) -> EngineStats:
    """The sum of all. `role_places` is the most: every engine has places for the same roles."""
    known = list(all_stats)
    names = [each.name for each in fields(EngineStats) if each.name not in ("roles", "running_roles", "role_places")]
    running: Counter[str] = Counter()
    for each in known:
        running.update(each.running_roles)
    return EngineStats(
        **{name: sum(getattr(each, name) for each in known) for name in names},
        roles=_roles([each.roles for each in known]),
        role_places=max((each.role_places for each in known), default=0),
        running_roles=dict(running),
    )


def _roles(known: list[Mapping[str, TokenSums]]) -> dict[str, TokenSums]:
    names = dict.fromkeys(name for each in known for name in each)
    return {
        name: TokenSums(
            **{
                field.name: sum(getattr(each[name], field.name) for each in known if name in each)
                for field in fields(TokenSums)
            }
        )
        for name in names
    }
