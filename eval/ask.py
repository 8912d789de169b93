"""A test's questions put to a team: many at once, what is answered already left out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lragent.errors import UserError
from lragent.eval.agent import ROLES, Complete, Episode, Limits
from lragent.eval.answers import Answer, AnswerFile
from lragent.eval.engine_client import engine_complete
from lragent.eval.examine import examine
from lragent.eval.world.questions import Question
from lragent.eval.world.testset import TestSet
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve import Engine
from lragent.serve.engine.engine import MOST_WAITING


@dataclass(frozen=True)
class Asking:
    """How questions are asked."""

    workers: int = 64
    """Questions at once."""
    iterations: int = 45
    """Of one question, at most; one is a decision of plan and what follows from it."""
    max_tokens_in_cache: int | None = None
    """Of an engine in this process; None = what fits the memory that is free."""

    def __post_init__(self) -> None:
        """Raises UserError naming the field that is out of range."""
        for name in ("workers", "iterations", "max_tokens_in_cache"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: must be at least 1, not {value}.")
        if self.workers > MOST_WAITING:
            raise UserError(f"workers: must be at most {MOST_WAITING}, as no engine takes more, not {self.workers}.")


@contextmanager
def served(model: str | None, pack: Path | None, mode: SharingMode, asking: Asking) -> Iterator[Complete]:
    """An engine in this process for the length of a block. Where one role writes each token, the base writes what comes
    before the first turn, whatever the pack was trained for: so all packs are asked alike. Raises UserError, also where
    the team lacks a role."""
    engine = Engine(
        model,
        pack,
        sharing=mode,
        prefix_writer=PrefixWriter.BASE if mode.one_writer_per_token else None,
        max_num_seqs=asking.workers,
        max_tokens_in_cache=asking.max_tokens_in_cache,
    )
    # Whoever keeps what the block was given must not keep the engine's memory.
    speakers = [engine_complete(engine)]
    try:
        with engine:
            if missing := [role for role in ROLES if role not in engine.roles]:
                raise UserError(f"{pack or 'roles'}: has no role {missing[0]!r}; the team is {', '.join(ROLES)}.")
            yield lambda role, messages, max_tokens: speakers[0](role, messages, max_tokens)
    finally:
        speakers.clear()
        del engine
        free_memory()


def free_memory() -> None:
    """Give back what no object holds any more, so that others on the GPU can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def unanswered(test: TestSet, count: int, file: AnswerFile) -> list[Question]:
    """Those of the first `count` questions that `file` does not hold."""
    return [question for question in test.questions[:count] if question.id not in file.answers]


def ask(
    test: TestSet,
    count: int,
    complete: Complete,
    file: AnswerFile,
    asking: Asking,
    *,
    deadline: float = float("inf"),
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> None:
    """Ask those of the first `count` questions that `file` does not hold, and write each down as it is answered. After
    `deadline` (of `time.monotonic`) none is begun. Raises what `complete` raises."""

    def ended(question: Question, episode: Episode) -> None:
        answer = Answer.of(question, episode)
        file.add(answer)
        on_answer(answer)

    missing, limits = unanswered(test, count, file), Limits(iterations=asking.iterations)
    examine(test, missing, complete, limits, workers=asking.workers, deadline=deadline, on_end=ended)
