"""A run's losses as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTHED = 25
"""The curve of the training loss is a mean over this part of the run's steps."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows of `metrics.jsonl` as a PNG: losses above, the learning rate below.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in rows if "loss" in row]
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    at = [row["step"] for row in steps]
    losses.plot(at, [row["loss"] for row in steps], color="0.8", linewidth=1, label="training, each step")
    losses.plot(at, _smooth([row["loss"] for row in steps]), color="black", label="training")
    for role in sorted({name for row in steps for name in row if name.startswith("loss_")}):
        own = [row for row in steps if role in row]
        smooth = _smooth([row[role] for row in own])
        losses.plot([row["step"] for row in own], smooth, linewidth=1, label=f"training, {role.removeprefix('loss_')}")
    evaluations = [row for row in rows if "eval" in row]
    for kind in evaluations[0]["eval"] if evaluations else ():
        held_out = [row["eval"][kind]["all"] for row in evaluations]
        losses.plot([row["step"] for row in evaluations], held_out, "o--", label=f"held out, {kind}")
    losses.set_ylabel("loss per authored token (nats)")
    losses.set_yscale("log")
    losses.grid(alpha=0.3)
    losses.legend(ncols=2, fontsize="small")
    rates.plot(at, [row["lr"] for row in steps], color="black")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimizer step")
    rates.grid(alpha=0.3)
    figure.savefig(path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the values before and at each."""
    width = max(1, len(values) // SMOOTHED)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / (i + 1 - max(0, i + 1 - width)) for i in range(len(values))]
