"""Accuracy of every regime in every mode, and what a loss of accuracy buys, as pictures."""

from __future__ import annotations

from pathlib import Path

from lragent.eval.report.pictures import new_figure, save
from lragent.eval.study.summary import BASIS, Study
from lragent.modes import SharingMode

MARKERS = "osD^vP"
"""One for each regime, in their order."""
SIDEWAYS = 0.16
"""Between two modes of a regime, where regimes are 1 apart."""


def draw_accuracy(study: Study, path: Path) -> None:
    """Write a PNG: right answers in percent with 95% intervals, by regime, a colour for each mode, and a small dot for
    each seed."""
    figure = new_figure(3 + 1.4 * len(study.regimes), 4.2)
    axes = figure.subplots()
    for number, mode in enumerate(SharingMode):
        cells = [study.cells.get((regime, mode.value)) for regime in study.regimes]
        found = [(at, cell) for at, cell in enumerate(cells) if cell is not None]
        if not found:
            continue
        shares = [100 * cell.share for _, cell in found]
        ends = [[100 * end for end in cell.interval()] for _, cell in found]
        around = [
            [max(0.0, share - low) for share, (low, _) in zip(shares, ends, strict=True)],
            [max(0.0, high - share) for share, (_, high) in zip(shares, ends, strict=True)],
        ]
        places = [at + SIDEWAYS * (number - (len(SharingMode) - 1) / 2) for at, _ in found]
        axes.errorbar(places, shares, around, fmt="o", capsize=3, color=f"C{number}", label=mode.value)
        seeds = [
            (place, 100 * share)
            for place, (_, cell) in zip(places, found, strict=True)
            for share in cell.shares.values()
        ]
        dots = [place for place, _ in seeds], [share for _, share in seeds]
        axes.scatter(*dots, s=9, color=f"C{number}", alpha=0.5, linewidths=0)
    axes.set_xticks(range(len(study.regimes)), study.regimes)
    axes.set_ylabel("right answers, %")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_cost(study: Study, path: Path) -> None:
    """Write a PNG: points lost against the best exact cell over prompt tokens computed for a question."""
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    regimes, modes = study.regimes, list(SharingMode)
    for (regime, mode), cell in study.cells.items():
        difference = study.from_best(regime, mode)
        lost = 0.0 if cell is study.best else -difference.points if difference is not None else None
        if lost is not None:
            marker, colour = MARKERS[regimes.index(regime)], f"C{modes.index(SharingMode(mode))}"
            axes.plot(cell.mean("computed"), lost, marker, color=colour)
    for number, mode_ in enumerate(modes):
        axes.plot([], [], "s", color=f"C{number}", label=mode_.value)
    for regime, marker in zip(regimes, MARKERS, strict=False):
        axes.plot([], [], marker, color="grey", label=regime)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("prompt tokens computed for a question")
    axes.set_ylabel(f"points lost against the best {BASIS}")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
