"""Records of runs as a section of a report: what a question took, as a user waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lragent.eval.records import Record
from lragent.eval.report.markdown import table

HEADS = (
    "run", "served", "questions", "at once", "right, %", "turns", "computed", "reused", "seconds",
    "to first tokens, s", "machine",
)  # fmt: skip


def section(records: Sequence[Record], pictures: Path) -> str:
    """Markdown over records of kind `speed`; others are passed over. "" where there are none. It draws no pictures."""
    own = [record for record in records if record["kind"] == "speed"]
    if not own:
        return ""
    levels = " and ".join(f"`{level}`" for level in sorted({record["level"] for record in own}))
    introduction = (
        f"Means over the questions, level {levels}, by `lragent eval run`. Seconds are what the team waited for the "
        "model in all turns of a question, and of these until first tokens; several questions that are asked at once "
        "wait for each other too. Times of different machines, or of other numbers at once, do not compare."
    )
    return f"{introduction}\n\n{table(HEADS, [_row(record) for record in own])}\n"


def _row(record: Record) -> list[str]:
    mean = record["mean"]
    return [
        record["label"],
        f"`{record['mode']}`",
        f"{record['asked']:,}",
        ", ".join(map(str, record["workers"])) or "-",
        f"{100 * record['right'].count('1') / record['asked']:.1f}",
        f"{mean['turns']:.1f}",
        f"{mean['computed']:,.0f}",
        f"{mean['reused']:,.0f}",
        f"{mean['seconds']:.3f}",
        f"{mean['ttft_s']:.3f}",
        ", ".join(record["machines"]) or "-",
    ]
