"""What became of each question, one line of a file for each, so that asking can go on where it ended."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from lragent.errors import UserError
from lragent.eval.agent import Ending, Episode
from lragent.eval.world.questions import Question
from lragent.eval.world.score import is_right


@dataclass(frozen=True)
class Answer:
    """One question's trajectory in numbers. Tokens are of all its turns together."""

    id: str
    kind: str
    answer: str | None
    """None where the team gave none (out of function)."""
    right: bool
    ending: Ending
    iterations: int
    turns: int
    """Generated; tools not counted."""
    context: int
    """Tokens in the end, prompt and last turn."""
    generated: int
    computed: int
    """Prompt tokens that went through the model."""
    reused: int
    """Prompt tokens whose base (or full) cache was found."""
    seconds: float
    """That the team waited for the model."""
    ttft_s: float
    """Of these, until first tokens."""

    @classmethod
    def of(cls, question: Question, episode: Episode) -> Answer:
        """From an episode that has ended. What the backend did not tell counts as 0."""
        assert episode.ending is not None
        replies = [step.reply for step in episode.steps if step.reply is not None]
        last = replies[-1] if replies else None
        return cls(
            id=question.id,
            kind=question.kind,
            answer=episode.answer,
            right=is_right(question, episode.answer),
            ending=episode.ending,
            iterations=episode.iterations,
            turns=len(replies),
            context=(last.prompt_tokens or 0) + (last.generated_tokens or 0) if last else 0,
            generated=sum(reply.generated_tokens or 0 for reply in replies),
            computed=sum(reply.tokens_computed or 0 for reply in replies),
            reused=sum(reply.tokens_reused or 0 for reply in replies),
            seconds=round(sum(reply.total_s or 0.0 for reply in replies), 4),
            ttft_s=round(sum(reply.ttft_s or 0.0 for reply in replies), 4),
        )


class AnswerFile:
    """A file of answers that grows. One process writes to it at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or begins the file; a last line that was cut off is dropped. Raises UserError where another is bad."""
        self.path = path
        self.answers: dict[str, Answer] = {}
        whole = 0
        content = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            answer = _read(line, f"{path}:{number}")
            if self.answers.setdefault(answer.id, answer) != answer:
                raise UserError(f"{path}:{number}: question {answer.id!r} has two different answers; remove the file.")
            whole += len(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if whole < len(content):
            os.truncate(path, whole)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Writes it at once."""
        self._file.write(json.dumps(dataclasses.asdict(answer), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.answers[answer.id] = answer


def read_answers(path: Path) -> dict[str, Answer]:
    """The answers in a file, by question; what is cut off at its end is left out. Raises UserError."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    found = (_read(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.endswith(b"\n"))
    return {answer.id: answer for answer in found}


def _read(line: bytes, where: str) -> Answer:
    try:
        values = json.loads(line)
        return Answer(**values | {"ending": Ending(values["ending"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: is no answer of `lragent eval` ({error}); remove the line.") from error
