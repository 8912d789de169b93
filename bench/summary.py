"""From records to figures: medians over rounds, each beside its floor."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lragent.bench.engines import Counters, Memory
from lragent.bench.playing import Played
from lragent.bench.roofline import Floor
from lragent.bench.trace_plan import Entry
from lragent.bench.traces import team, trace_work
from lragent.modes import SharingMode


@dataclass(frozen=True)
class Round:
    """One run of an entry. memory, counters: None for an endpoint, which does not say."""

    played: Played
    memory: Memory | None = None
    counters: Counters | None = None


def throughput(played: Played) -> float:
    """Tokens of all sequences, prompts and answers, a second from beginning to end (the paper's definition).

    NaN, as elsewhere here, where nothing was answered.
    """
    return played.tokens / played.wall_s if played.records else math.nan


def ttft_sum_s(played: Played, steps: int) -> float:
    """A trajectory's times to first token, added up: the median over those that came to their end."""
    sums: dict[int, list[float]] = defaultdict(list)
    for record in played.records:
        sums[record.trajectory].append(record.ttft_s)
    whole = [sum(times) for times in sums.values() if len(times) == steps]
    return statistics.median(whole) if whole else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def row(name: str, mode: str, entry: Entry, rounds: Sequence[Round], floor: Floor | None) -> dict[str, Any]:
    """An entry's figures: medians over `rounds`, memory at its highest; seconds, milliseconds (`_ms`) and bytes.

    Shares are of the floor: 1 is as fast as the machine allows. With arrivals at a rate, throughput has no floor.
    """
    steps = len(entry.trace(team(entry.roles)))
    plays = [one.played for one in rounds]

    def median(figure: Callable[[Played], float]) -> float | None:
        values = [value for played in plays if not math.isnan(value := figure(played))]
        return statistics.median(values) if values else None

    def gaps(played: Played) -> list[float]:
        return [gap for record in played.records for gap in record.gaps_s]

    figures = {
        "tokens_s": median(throughput),
        "ttft_sum_s": median(lambda played: ttft_sum_s(played, steps)),
        "gap_ms": _scaled(median(lambda played: percentile(gaps(played), 0.5)), 1e3),
        "gap_p99_ms": _scaled(median(lambda played: percentile(gaps(played), 0.99)), 1e3),
    }
    floors: dict[str, float | None] = dict.fromkeys(("tokens_s", "ttft_sum_s", "gap_ms"))
    if floor is not None:
        whole = entry.tokens * entry.load.trajectories / floor.total_s
        floors = {
            "tokens_s": whole if entry.load.rate is None else None,
            "ttft_sum_s": floor.ttft_sum_s,
            "gap_ms": floor.gap_s * 1e3,
        }
    costs = [record.cost for record in plays[0].records]
    return {
        "system": name,
        "mode": mode,
        "context": entry.context,
        "roles": entry.roles,
        "trajectories": entry.load.trajectories,
        "concurrent": entry.load.concurrent,
        "rate": entry.load.rate,
        "tokens": entry.tokens,
        "repeats": len(rounds),
        **{key: _rounded(value) for key, value in figures.items()},
        "floor": {key: _rounded(value) for key, value in floors.items()},
        "share": {key: _rounded(_share(key, figures[key], floors[key])) for key in floors},
        "memory": _memory(rounds),
        "needed": _needed(mode, entry),
        "computed": _total([cost.computed for cost in costs]),
        "base_reused": _total([cost.base_reused for cost in costs]),
        "lr_reused": _total([cost.lr_reused for cost in costs]),
        "generated": sum(record.generated for record in plays[0].records),
        **_counters(rounds),
        "failures": [failure for played in plays for failure in played.failures],
    }


def _needed(mode: str, entry: Entry) -> int:
    """Prompt tokens that the mode must compute where nothing is evicted: what `computed` should be."""
    works = trace_work(entry.trace(team(entry.roles)), SharingMode(mode))
    return entry.load.trajectories * sum(work.full + work.lr_only for work in works)


def _share(key: str, figure: float | None, floor: float | None) -> float | None:
    """A rate is a share of its ceiling, a time's floor is a share of the time."""
    if not figure or not floor:
        return None
    return figure / floor if key == "tokens_s" else floor / figure


def _memory(rounds: Sequence[Round]) -> dict[str, int | None] | None:
    """The highest of each part."""
    parts = [asdict(one.memory) for one in rounds if one.memory is not None]
    if not parts:
        return None
    return {key: None if parts[0][key] is None else max(part[key] for part in parts) for key in parts[0]}


def _counters(rounds: Sequence[Round]) -> dict[str, int | None]:
    """Of all rounds together."""
    counted = [asdict(one.counters) for one in rounds if one.counters is not None]
    names = asdict(Counters())
    return {name: sum(one[name] for one in counted) if counted else None for name in names}


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _rounded(value: float | None) -> float | None:
    """Four significant digits or more."""
    return None if value is None else float(f"{value:.5g}")
