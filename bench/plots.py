"""Throughput, times to first token and memory against the trajectory's length, a line for each system, as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lragent.atomic import write_file
from lragent.bench.trace_report import load

Row = dict[str, Any]

PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("tokens per second", lambda row: row["tokens_s"]),
    ("sum of times to first token, s", lambda row: row["ttft_sum_s"]),
    (
        "cache in use at its peak, GiB",
        lambda row: row["memory"] and (row["memory"]["base"] + row["memory"]["lr"]) / 2**30,
    ),
)
"""Title and figure."""


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write `rows` as a PNG. Dotted: the throughput that the machine allows in that mode, and the least ΣTTFT."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    plain = FuncFormatter(lambda number, _: f"{number:g}")

    lines: dict[str, list[Row]] = {}
    loads = {load(row) for row in rows}
    teams = {row["roles"] for row in rows}
    for row in rows:
        name = row["system"]
        name += f", {row['roles']} roles" if len(teams) > 1 else ""
        name += f", {load(row)}" if len(loads) > 1 else ""
        lines.setdefault(name, []).append(row)
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, len(PANELS))
    for axes, (what, value), floor in zip(panels, PANELS, ("tokens_s", "ttft_sum_s", None), strict=True):
        for at, (name, members) in enumerate(lines.items()):
            points = sorted((row["tokens"], number) for row in members if (number := value(row)) is not None)
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=f"C{at % 10}") if points else None
            if floor is not None:
                bounds = sorted((row["tokens"], row["floor"][floor]) for row in members if row["floor"][floor])
                axes.plot(
                    *zip(*bounds, strict=True), linestyle=":", marker="_", color=f"C{at % 10}"
                ) if bounds else None
        axes.set_title(what)
        axes.set_xlabel("tokens of a trajectory")
        axes.set_xscale("log")
        axes.set_yscale("log")
        lengths = sorted({row["tokens"] for row in rows})
        axes.set_xticks(lengths, [f"{tokens / 1000:.1f}k" for tokens in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="both", alpha=0.2)
    panels[0].legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_file(path, content.getvalue())
