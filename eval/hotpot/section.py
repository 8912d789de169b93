"""Records of real text as a section of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lragent.eval.agent import ROLES, Ending
from lragent.eval.hotpot.measure import ANSWERS, LIMITS, LOSS, STEPS
from lragent.eval.intervals import wilson
from lragent.eval.paired import Paired, interval
from lragent.eval.records import Record
from lragent.eval.report.markdown import table
from lragent.modes import SharingMode

_MODES = [str(mode) for mode in SharingMode]
_NONE, _ALL = "-", "all"


def section(records: Sequence[Record], pictures: Path) -> str:
    """Markdown: loss, next steps and answers by label and sharing mode. Records of other kinds are passed over.

    pictures: the folder for a section's pictures; this one draws none. Seeds of one label are put together, and where
    there are several the text says so. Empty where no record is of real text.
    """
    own = [record for record in records if record["kind"] in (LOSS, STEPS, ANSWERS)]
    if not own:
        return ""
    labels = list(dict.fromkeys(record["label"] for record in own))
    parts = [_introduction(own)]
    for kind, title, cell in (
        (LOSS, "Loss per authored token on held-out trajectories, in nats (teacher-forced)", _loss),
        (STEPS, "Turns of held-out trajectories that the engine generates exactly, in percent", _steps),
    ):
        if found := [record for record in own if record["kind"] == kind]:
            parts += [f"### {title}", _by_role(labels, found, cell)]
    if answers := [record for record in own if record["kind"] == ANSWERS]:
        parts += ["### Answers to held-out questions", _answers(labels, answers)]
    return "\n\n".join(parts) + "\n"


def _introduction(records: Sequence[Record]) -> str:
    seeds = len({record["seed"] for record in records})
    sizes = [len(record["questions"]) for record in records if record["kind"] == ANSWERS]
    apart = "each with a division and a training of its own; some questions are held out in several"
    several = f" {seeds} seeds are put together, {apart}." if seeds > 1 else ""
    asked = f" The team was asked {_span(sizes)} held-out questions a seed." if sizes else ""
    return (
        "HotpotQA trajectories that AutoAct recorded, divided by question; roles learn from one part and are measured "
        f"on the other.{several} Thoughts are free text, so exact turns are mostly names of tools, arguments and "
        "verdicts. Then the team answers held-out questions itself, with a BM25 search over what AutoAct's tools once "
        f"found, in at most {LIMITS.iterations} decisions of plan.{asked} Intervals are Wilson's, 95%. The sample is "
        "small: a difference between modes whose intervals overlap much is no finding, and turns of one "
        "trajectory are not independent, so that the true intervals of turns are somewhat wider. Answers are scored as "
        "HotpotQA does (exact match and F1 in normal form); won and lost are questions that only this mode, and only "
        "`non_shared`, answered right, and what that makes in points, with its 95% bootstrap interval."
    )


def _by_role(labels: Sequence[str], records: Sequence[Record], cell: Callable[[Sequence[Record]], str]) -> str:
    modes = [mode for mode in _MODES if any(record["mode"] == mode for record in records)]
    rows = []
    for label in labels:
        for role in (*ROLES, _ALL):
            found = [
                [r for r in records if (r["label"], r["mode"]) == (label, mode) and role in (r["role"], _ALL)]
                for mode in modes
            ]
            if any(found):
                rows.append([label, role, *(cell(some) if some else _NONE for some in found)])
    return table(["trained", "role", *(f"`{mode}`" for mode in modes)], rows)


def _loss(records: Sequence[Record]) -> str:
    tokens = sum(record["tokens"] for record in records)
    return f"{sum(record['loss'] * record['tokens'] for record in records) / tokens:.3f}"


def _steps(records: Sequence[Record]) -> str:
    return _share(sum(record["right"] for record in records), sum(record["turns"] for record in records))


def _answers(labels: Sequence[str], records: Sequence[Record]) -> str:
    rows = []
    for label in labels:
        for mode in _MODES:
            asked: list[dict[str, Any]] = [
                question
                for record in records
                if (record["label"], record["mode"]) == (label, mode)
                for question in record["questions"]
            ]
            if not asked:
                continue
            endings = [question["ending"] for question in asked]
            rows.append(
                [
                    label,
                    f"`{mode}`",
                    _share(sum(question["right"] for question in asked), len(asked)),
                    f"{100 * _mean(question['f1'] for question in asked):.1f}",
                    f"{_mean(question['steps'] for question in asked):.1f}",
                    *(str(endings.count(ending)) for ending in Ending),
                    str(len(asked)),
                    _NONE if mode == SharingMode.NON_SHARED else _against_non_shared(label, mode, records),
                ]
            )
    heads = ["trained", "served", "exact match, %", "F1, %", "steps", "answered", "gave up", "context full", "asked"]
    return table([*heads, "won and lost"], rows)


def _against_non_shared(label: str, mode: str, records: Sequence[Record]) -> str:
    """Questions that are right here only, and in `non_shared` only, of those that both were asked; and in points."""

    def right(seed: int, served: str) -> dict[str, bool]:
        return {
            question["id"]: question["right"]
            for record in records
            if (record["label"], record["seed"], record["mode"]) == (label, seed, served)
            for question in record["questions"]
        }

    pairs = []
    for seed in sorted({record["seed"] for record in records}):
        here, there = right(seed, mode), right(seed, SharingMode.NON_SHARED)
        if both := here.keys() & there.keys():
            pairs.append(Paired.of([there[key] for key in both], [here[key] for key in both]))
    if not pairs:
        return _NONE
    low, high = interval(pairs)
    points = f"{100 * _mean(pair.difference for pair in pairs):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"+{sum(pair.only_second for pair in pairs)} -{sum(pair.only_first for pair in pairs)}: {points}"


def _share(right: int, total: int) -> str:
    low, high = wilson(right, total)
    return f"{100 * right / total:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
