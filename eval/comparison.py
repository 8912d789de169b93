"""Ways to serve one team, compared on the questions that all of them were asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from lragent.eval.agent import Ending
from lragent.eval.answers import Answer, read_answers
from lragent.eval.paired import Paired, bootstrap, interval


def show(files: Mapping[str, Path], console: Console) -> None:
    """A table with a row for each of `files`, by name; differences are from the first of them. Raises UserError."""
    found = {name: read_answers(path) for name, path in files.items()}
    common = sorted(set.intersection(*(set(answers) for answers in found.values())))
    if not common:
        console.print("there are no answers yet")
        return
    table = Table(title=f"{len(common)} questions; 95% intervals")
    for name in ("", "right %", "difference", "p", "no answer %", "iterations", "tokens in the end"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("computed", "reused", "seconds"):
        table.add_column(name, justify="right")
    first = [found[next(iter(found))][at] for at in common]
    for name, answers in found.items():
        rows = [answers[at] for at in common]
        table.add_row(name, *_accuracy(rows, first), *_costs(rows))
    console.print(table)


def _accuracy(rows: list[Answer], first: list[Answer]) -> list[str]:
    right = sum(answer.right for answer in rows)
    low, high = bootstrap(right, len(rows))
    cells = [f"{100 * right / len(rows):.1f} ({100 * low:.1f} to {100 * high:.1f})"]
    if rows is first or rows == first:
        return [*cells, "", ""]
    pair = Paired.of([answer.right for answer in first], [answer.right for answer in rows])
    low, high = interval([pair])
    return [*cells, f"{100 * pair.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", f"{pair.mcnemar:.2g}"]


def _costs(rows: list[Answer]) -> list[str]:
    none = sum(answer.ending != Ending.ACCEPTED for answer in rows)
    return [
        f"{100 * none / len(rows):.1f}",
        *(f"{fmean(getattr(answer, name) for answer in rows):.1f}" for name in ("iterations", "context")),
        *(f"{fmean(getattr(answer, name) for answer in rows):,.0f}" for name in ("computed", "reused")),
        f"{fmean(answer.seconds for answer in rows):.3f}",
    ]
