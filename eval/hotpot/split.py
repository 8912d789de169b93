"""AutoAct's rows, divided by question: what is learnt from, and what is held out.

Several rows may ask the same question, so it is questions that are dealt out, not rows. The passages are those of all
rows: the world in which held-out questions are asked is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lragent.atomic import new_folder
from lragent.errors import UserError
from lragent.eval.hotpot.corpus import Passage, passages_of
from lragent.eval.hotpot.tools import Shelf, ShelfDesk
from lragent.eval.world.form import Form
from lragent.eval.world.score import normalise
from lragent.train.autoact import SYSTEM, Converted, convert, read_autoact
from lragent.train.rows import read_rows

TRAIN, HELD_OUT, QUESTIONS, PASSAGES = "train.jsonl", "held_out.jsonl", "questions.jsonl", "passages.jsonl"
SHARE = 0.2
"""Of the questions: held out."""
FORM = Form(SYSTEM, split_turns=True)
"""Thought and tool name are turns of their own, as in the paper: a tool's name can be predicted exactly, a thought
hardly ever."""

Row = dict[str, Any]
"""A row of training data."""


@dataclass(frozen=True)
class TextQuestion:
    """A held-out question. Rows that ask the same may word the answer differently: any of them is right."""

    id: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class HeldOut:
    """What it takes to examine a team on real text; see `examine`."""

    trajectories: tuple[Sequence[Mapping[str, Any]], ...]
    """Gold trajectories, each the messages of one."""
    questions: tuple[TextQuestion, ...]
    """In random order, so that the first few are a fair sample."""
    passages: tuple[Passage, ...]
    form: Form = FORM

    def desks(self) -> Callable[[], ShelfDesk]:
        """What makes a desk for each trajectory, all over one shelf."""
        return partial(ShelfDesk, Shelf(self.passages))


@dataclass(frozen=True)
class Split:
    """Both parts, and what the conversion kept and dropped."""

    train: tuple[Row, ...]
    held_out: HeldOut
    counts: Converted


def split(rows: Sequence[Mapping[str, Any]], seed: int) -> Split:
    """Deal the questions of AutoAct's rows out, the same for the same seed in whatever order rows come.

    Rows without a question, an answer and a prompt are dropped. A held-out question is asked even where none of its
    rows makes a trajectory. Raises UserError where either part would be empty.
    """
    counts = Converted()
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if _is_whole(row):
            asked.setdefault(normalise(row["question"]), []).append(row)
        else:
            counts.rows += 1
            counts.dropped["no `question`, `answer` and `prompt`"] += 1
    for same in asked.values():
        same.sort(key=lambda row: str(row["prompt"]))
    trajectories = {
        key: list(convert(same, only_correct=False, split_turns=FORM.split_turns, counts=counts))
        for key, same in asked.items()
    }
    order = sorted(asked)
    random.Random(f"lragent:{seed}:questions").shuffle(order)
    out = order[: round(SHARE * len(order))]
    train = [row for key in order[len(out) :] for row in trajectories[key]]
    gold = [row["messages"] for key in out for row in trajectories[key]]
    if not train or not gold:
        raise UserError(f"{len(order)} questions are too few to be divided; give more rows of AutoAct's.")
    passages = passages_of(row for key in sorted(asked) for row in asked[key])  # whatever the seed, the same
    held_out = HeldOut(tuple(gold), tuple(_question(key, asked[key]) for key in out), tuple(passages))
    return Split(tuple(train), held_out, counts)


def write_split(files: Sequence[Path], seed: int, folder: Path) -> Split:
    """Divide the rows of AutoAct's `files` and write the new `folder`, whole or not at all.

    Raises UserError naming a file that cannot be read, or the folder.
    """
    made = split([row for path in files for row in read_autoact(path)], seed)
    out = made.held_out
    with new_folder(folder) as draft:
        _write(draft / TRAIN, made.train)
        _write(draft / HELD_OUT, ({"messages": messages} for messages in out.trajectories))
        _write(draft / QUESTIONS, map(dataclasses.asdict, out.questions))
        _write(draft / PASSAGES, map(dataclasses.asdict, out.passages))
    return made


def read_held_out(folder: Path) -> HeldOut:
    """What `write_split` wrote, but the training rows. Raises UserError naming the file that is anything else."""
    for name in (HELD_OUT, QUESTIONS, PASSAGES):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; make the folder by `lragent eval text split`.")
    try:
        return HeldOut(
            tuple(row["messages"] for row, _ in read_rows(folder / HELD_OUT)),
            tuple(
                TextQuestion(row["id"], row["text"], tuple(row["answers"])) for row, _ in read_rows(folder / QUESTIONS)
            ),
            tuple(Passage(row["text"], tuple(row["names"])) for row, _ in read_rows(folder / PASSAGES)),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: a row lacks a field ({error}); make it anew by `lragent eval text split`."
        ) from error


def _is_whole(row: Any) -> bool:
    return isinstance(row, Mapping) and all(isinstance(row.get(name), str) for name in ("question", "answer", "prompt"))


def _question(key: str, rows: Sequence[Mapping[str, Any]]) -> TextQuestion:
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return TextQuestion(digest, min(row["question"] for row in rows), tuple(sorted({row["answer"] for row in rows})))


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
