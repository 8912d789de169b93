"""The comparison as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lragent.eval.records import Record
from lragent.eval.study.summary import BASIS, Study
from lragent.modes import SharingMode


def show(records: Sequence[Record], console: Console) -> None:
    """Accuracy of each regime in each mode with its 95% interval, and the paired difference from `non_shared`."""
    study = Study(records)
    if not study.cells:
        console.print("there are no answers yet")
        return
    table = Table(title=f"right answers in percent, level {study.level}, seeds {study.seeds}; 95% intervals")
    table.add_column("trained")
    for mode in SharingMode:
        table.add_column(mode.value, justify="right")
    for regime in study.regimes:
        row = [regime]
        for mode in SharingMode:
            cell = study.cells.get((regime, mode.value))
            if cell is None:
                row.append("-")
                continue
            low, high = cell.interval()
            text = f"{100 * cell.share:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            difference = None if mode == BASIS else study.from_exact(regime, mode.value)
            if difference is not None:
                low, high = difference.interval()
                text += f"\n{difference.points:+.1f} ({low:+.1f} to {high:+.1f})"
            row.append(text)
        table.add_row(*row)
    console.print(table)
