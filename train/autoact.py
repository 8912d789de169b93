"""HotpotQA trajectories of AutoAct as trajectories of roles.

A row holds one text: a description of tools, the question, then lines `Thought n:`, `Action n: Tool[argument]` and
`Observation n:`. Here plan writes the thought and names the tool, action writes the argument; after `Finish`, reflect
writes its thought and the verdict. Observations are tool output. What the environment says about the answer being right
is never kept: neither a prompt nor a target may know it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lragent.errors import UserError

TOOLS = ("BingSearch", "Retrieve", "Lookup", "Finish", "Reflect")
SYSTEM = (
    "Answer the question with tools. Each turn, plan says what is needed and names a tool, then action gives its "
    "argument. BingSearch[query] searches the web, Retrieve[entity] gives the first paragraph of an article, "
    "Lookup[keyword] gives the next sentence with that keyword, Finish[answer] ends; then reflect says whether the "
    "answer is right or wrong."
)
"""One for all roles: a system prompt of its own for each would end the common prefix."""

_PART = re.compile(r"^(Thought|Action|Observation) (\d+):[ \t]*", re.MULTILINE)
_ACTION = re.compile(r"(?P<tool>[A-Za-z ]+)\[(?P<argument>.*)\]\.?", re.DOTALL)


@dataclass
class Converted:
    """What a conversion kept, and what it dropped and why."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows, by the reason."""
    steps: int = 0
    cut_steps: Counter[str] = field(default_factory=Counter)
    """Steps cut out of rows that were kept, by the reason."""


@dataclass(frozen=True)
class Step:
    """One numbered step of a row; what is missing is empty."""

    thought: str
    tool: str | None
    """One of `TOOLS`; None where the action is not Tool[argument] with one of them."""
    argument: str
    observation: str
    """What the environment said, be it a page, an error, or whether the answer is right."""


def read_autoact(path: Path) -> list[Any]:
    """The rows of a file: a JSON list, or JSONL. Raises UserError naming it where it is neither."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a JSON list or JSONL ({error}).") from error
    return list(rows)


def convert(
    rows: Sequence[Any], *, only_correct: bool, split_turns: bool, counts: Converted
) -> Iterator[dict[str, Any]]:
    """Yield a training row for each of `rows` that makes one, and add to `counts`.

    only_correct: keep rows whose answer the environment found right. split_turns: thought and tool name, and reason and
    verdict, are turns of their own, as in LRAgent's traces (arXiv 2602.01053).
    """
    for row in rows:
        counts.rows += 1
        reason = _reason_against(row, only_correct)
        messages: list[dict[str, str]] = []
        if reason is None:
            cut: Counter[str] = Counter()
            steps = steps_in(row["prompt"])
            messages = _messages(row["question"], steps, split_turns, cut)
            if not any(message.get("name") == "reflect" for message in messages):
                reason = "no answer that is judged"
        if reason is not None:
            counts.dropped[reason] += 1
            continue
        counts.kept += 1
        counts.steps += len(steps)
        counts.cut_steps += cut
        yield {"messages": messages}


def _reason_against(row: Any, only_correct: bool) -> str | None:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in ("question", "prompt")):
        return "no `question` and `prompt`"
    if row.get("error"):
        return "marked as an error"
    if row.get("halted"):
        return "halted without an end"
    if only_correct and not row.get("correct"):
        return "not correct"
    return None


def steps_in(prompt: str) -> list[Step]:
    """The numbered parts of a prompt, put together by their numbers."""
    found: dict[int, dict[str, str]] = {}
    marks = list(_PART.finditer(prompt))
    ends = [*(mark.start() for mark in marks[1:]), len(prompt)]
    for mark, end in zip(marks, ends, strict=False):  # where there is no mark, the one end is of nothing
        text = prompt[mark.end() : end].strip()
        found.setdefault(int(mark[2]), {}).setdefault(mark[1], text)
    steps = []
    for number in sorted(found):
        parts = found[number]
        action = _ACTION.fullmatch(parts.get("Action", ""))
        tool = action["tool"].replace(" ", "") if action is not None else None
        steps.append(
            Step(
                parts.get("Thought", ""),
                next((name for name in TOOLS if tool is not None and name.lower() == tool.lower()), None),
                action["argument"].strip() if action is not None else "",
                parts.get("Observation", ""),
            )
        )
    return steps


def _messages(question: str, steps: list[Step], split_turns: bool, cut: Counter[str]) -> list[dict[str, str]]:
    """Up to the last verdict. A step whose action is none had no effect, and is cut out with the answer to it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    ended, finished = len(messages), False

    def says(name: str, *texts: str) -> None:
        turns = [text for text in texts if text]
        for content in turns if split_turns else [" ".join(turns)]:
            messages.append({"role": "assistant", "name": name, "content": content})

    for step in steps:
        if step.tool is None or not step.argument:
            cut["the action is not Tool[argument]"] += 1
        elif step.tool == "Reflect":
            verdict = step.argument.lower()
            if not finished:
                cut["a verdict without an answer before it"] += 1
            elif verdict not in ("right", "wrong"):
                cut["a verdict that is neither right nor wrong"] += 1
            else:
                says("reflect", step.thought, verdict)
                ended, finished = len(messages), False
        else:
            finished = step.tool == "Finish"
            says("plan", step.thought, step.tool)
            says("action", step.argument)
            if not finished:  # after an answer the environment only asks for the verdict
                messages.append({"role": "tool", "content": step.observation})
    return messages[:ended]
