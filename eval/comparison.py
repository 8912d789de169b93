"""Ways to serve one team, compared on the questions that all of them were asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from lragent.eval.agent import Ending
from lragent.eval.answers import Answer, read_answers, settled
from lragent.eval.intervals import wilson
from lragent.eval.paired import Paired, interval


def show(files: Mapping[str, Path], console: Console) -> None:
    """A table with a column for each of `files`, by name; differences are from the first of them. Raises UserError."""
    found = {name: settled(read_answers(path), name, console.print) for name, path in files.items()}
    common = min(map(len, found.values()))
    if not common:
        console.print("there are no answers yet")
        return
    table = Table("", *found, title=f"questions that all were asked: {common}; 95% intervals")
    first, *others = [answers[:common] for answers in found.values()]
    rows = [first, *others]
    table.add_row("right %", *map(_right, rows))
    for name, compare in (("difference", _difference), ("p (McNemar)", _chance)):
        table.add_row(name, "", *(compare(_paired(first, other)) for other in others))
    for name, number in _COSTS.items():
        table.add_row(name, *(number(answers) for answers in rows))
    console.print(table)


def _right(answers: Sequence[Answer]) -> str:
    right = sum(answer.right for answer in answers)
    low, high = wilson(right, len(answers))
    return f"{100 * right / len(answers):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _paired(first: Sequence[Answer], second: Sequence[Answer]) -> Paired:
    return Paired.of([answer.right for answer in first], [answer.right for answer in second])


def _difference(pair: Paired) -> str:
    low, high = interval([pair])
    return f"{100 * pair.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _chance(pair: Paired) -> str:
    return f"{pair.mcnemar:.2g}"


_COSTS: dict[str, Callable[[Sequence[Answer]], str]] = {
    "no answer %": lambda them: f"{100 * fmean(answer.ending != Ending.ACCEPTED for answer in them):.1f}",
    "iterations": lambda them: f"{fmean(answer.iterations for answer in them):.1f}",
    "tokens in the end": lambda them: f"{fmean(answer.context for answer in them):,.0f}",
    "tokens computed": lambda them: f"{fmean(answer.computed for answer in them):,.0f}",
    "tokens reused": lambda them: f"{fmean(answer.reused for answer in them):,.0f}",
    "seconds": lambda them: f"{fmean(answer.seconds for answer in them):.3f}",
}
"""What a question took, by its name in the table."""
