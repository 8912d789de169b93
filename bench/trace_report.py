"""A trace benchmark's figures as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lragent.bench.peers import NAME, Comparison


def show_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Two tables: speeds with their shares of the floor, then memory and what was computed."""
    speeds = _table(
        "trajectories: medians, and how near they come to what the machine allows",
        "tokens", "roles", "load", "system", "tokens/s", "of roof", "ΣTTFT s", "of floor", "gap ms", "of floor",
        "p99 ms",
    )  # fmt: skip
    costs = _table(
        "memory at its peak, in MiB, and prompt tokens of all trajectories",
        "tokens", "roles", "load", "system", "weights", "base cache", "LR cache", "other", "computed", "needed",
        "base reused", "LR reused", "preempted", "evicted",
    )  # fmt: skip
    last = None
    for row in rows:
        case = [str(row["tokens"]), str(row["roles"]), load(row)]
        if last not in (None, case):
            speeds.add_section()
            costs.add_section()
        last = case
        share, memory = row["share"], row["memory"] or {}
        mark = " ✗" if row["failures"] else ""
        speeds.add_row(
            *case, row["system"] + mark, _number(row["tokens_s"], 1), _percent(share["tokens_s"]),
            _number(row["ttft_sum_s"], 3), _percent(share["ttft_sum_s"]), _number(row["gap_ms"], 2),
            _percent(share["gap_ms"]), _number(row["gap_p99_ms"], 2),
        )  # fmt: skip
        evicted = [row["base_evicted"], row["lr_evicted"]]
        costs.add_row(
            *case, row["system"] + mark, *(_mebibytes(memory.get(part)) for part in ("weights", "base", "lr", "other")),
            *(_number(row[name], 0) for name in ("computed", "needed", "base_reused", "lr_reused", "preempted")),
            "-" if None in evicted else f"{sum(evicted)}",
        )  # fmt: skip
    for table in (speeds, costs):
        console.print(table)


def show_micro(figures: Sequence[dict[str, Any]], console: Console) -> None:
    """Single figures."""
    table = _table("single figures", "", "measured", "", "floor", "of floor", "")
    for figure in figures:
        if "failed" in figure:
            table.add_row(figure["figure"], "-", "", "-", "-", figure["failed"][:80])
            continue
        note = f"{figure['tflops']:.3g} TFLOP/s" if figure.get("tflops") else ""
        note = f"{figure['decode_steps']:.2f} decode steps" if figure.get("decode_steps") else note
        measured, floor = _number(figure["value"], 2), _number(figure["floor"], 2)
        table.add_row(figure["figure"], measured, figure["unit"], floor, _percent(figure["share"]), note)
    console.print(table)


def show_peers(comparisons: Sequence[Comparison], console: Console) -> None:
    """Ours beside theirs. The even factor allows for ceilings that differ (see lragent.bench.peers.Comparison)."""
    table = _table(
        f"beside {NAME}: tokens/s",
        "tokens", "load", "roles", "its adapters", "ours", "theirs", "factor", "even factor", "wanted", "ΣTTFT s",
        "theirs",
    )  # fmt: skip
    for one in comparisons:
        reached = "" if one.reached is None else " ✓" if one.reached else " ✗"
        table.add_row(
            str(one.tokens), f"x{one.concurrent}", str(one.roles), str(one.adapters), _number(one.ours, 0),
            _number(one.theirs, 0), f"{one.factor:.2f}", f"{one.even_factor:.2f}", f"{_number(one.wanted, 2)}{reached}",
            _number(one.ttft_sum_s, 2), _number(one.their_ttft_sum_s, 2),
        )  # fmt: skip
    console.print(table)


def load(row: dict[str, Any]) -> str:
    """How many trajectories run at once, or arrive in a second."""
    return f"{row['rate']}/s" if row["rate"] else f"x{row['concurrent']}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "system") else "right")
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"
