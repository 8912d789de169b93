"""Cosines against layers, and divergence against steps, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lragent.eval.report.pictures import new_figure, save

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""By name: points (x, y)."""


def draw(panels: Mapping[str, Curves], path: Path, *, x: str, y: str, log: bool = False) -> None:
    """Write one PNG: `panels`, by title, side by side in rows of three. A curve has one colour in all panels.

    log: a logarithmic y axis that is linear near zero, as there are exact zeros.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5 * columns, 3.6 * rows)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    highest = max(height for curves in panels.values() for points in curves.values() for _, height in points)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=name, color=f"C{names.index(name) % 10}")
        if log:
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(0, 2 * max(highest, 1e-3))  # the same in all panels
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    save(figure, path)
