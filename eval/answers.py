"""What became of each question, one line of a file for each, so that asking can go on where it ended."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
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


def settled(
    answers: Mapping[str, Answer], name: str, tell: Callable[[str], None] = lambda sentence: None
) -> list[Answer]:
    """The answers that may be counted, of `answers` by question: those before the first question that has none.

    Questions are begun in order. Where work was broken off, the open ones are those that take long, which mostly fail:
    counted with what is behind the first of them, a team would look better than it is. `tell` hears how much that is,
    and of which cell by its `name`.
    """
    by_number = {int(question.rpartition("-")[2]): answer for question, answer in answers.items()}
    counted = [by_number[at] for at in itertools.takewhile(by_number.__contains__, itertools.count())]
    if behind := len(answers) - len(counted):
        are = "1 answer is" if behind == 1 else f"{behind:,} answers are"
        tell(
            f"{name}: {are} not counted yet, behind a question that is open: those that take long mostly fail. The "
            "command that asked goes on with it."
        )
    return counted


class AnswerFile:
    """A file of answers that grows. One process at a time has it."""

    def __init__(self, path: Path) -> None:
        """Opens or begins the file; a last line that was cut off is dropped. Raises UserError where a line is bad,
        where another process has the file, or where it cannot be written to."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror}).") from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another process writes to it; wait for its end.") from None
            content = path.read_bytes()
            self.answers: dict[str, Answer] = _answers_in(content, path)
            os.truncate(path, content.rfind(b"\n") + 1)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Writes it at once. Raises UserError where it cannot."""
        begins = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(json.dumps(dataclasses.asdict(answer), ensure_ascii=False).encode() + b"\n")
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(begins)  # the next line must not go on with half of this one
            raise UserError(f"{self.path}: cannot be written to ({error.strerror}).") from error
        self.answers[answer.id] = answer


def read_answers(path: Path) -> dict[str, Answer]:
    """The answers in a file, by question; what is cut off at its end is left out. Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    return _answers_in(content, path)


def _answers_in(content: bytes, path: Path) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        answer = _read(line, f"{path}:{number}")
        if answers.setdefault(answer.id, answer) != answer:
            raise UserError(f"{path}:{number}: question {answer.id!r} has two different answers; remove the file.")
    return answers


def _read(line: bytes, where: str) -> Answer:
    try:
        values = json.loads(line)
        int(values["id"].rpartition("-")[2])
        return Answer(**values | {"ending": Ending(values["ending"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: is no answer of `lragent eval` ({error}); remove the line.") from error
