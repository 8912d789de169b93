"""Asks many questions at once, for as long as there is time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from lragent.eval.agent import Complete, Desk, Episode, Limits, Message, Reply
from lragent.eval.world.form import Form
from lragent.eval.world.questions import Question
from lragent.eval.world.score import Score, score


class Asked(Protocol):
    """A question."""

    @property
    def text(self) -> str:
        """What the team is told."""
        ...


class Examinable(Protocol):
    """What questions are asked in: everything but the agent."""

    @property
    def form(self) -> Form:
        """Of the trajectories."""
        ...

    def desks(self) -> Callable[[], Desk]:
        """What makes a desk for each trajectory, from any thread."""
        ...


Q = TypeVar("Q", bound=Asked)


class _StoppedError(Exception):
    """Another worker failed, or the user gave up."""


@dataclass(frozen=True)
class Examination(Generic[Q]):
    """The questions that were asked, in order, and how each trajectory went."""

    questions: tuple[Q, ...]
    episodes: tuple[Episode, ...]

    @property
    def score(self: Examination[Question]) -> Score:
        """How many were right, of questions of the multi-hop world."""
        return score(self.questions, self.episodes)


def examine(
    test: Examinable,
    questions: Sequence[Q],
    complete: Complete,
    limits: Limits,
    *,
    workers: int,
    at_least: int = 0,
    deadline: float = float("inf"),
    on_end: Callable[[Q, Episode], None] | None = None,
) -> Examination[Q]:
    """Ask `questions` in order, `workers` at a time; after `deadline` (of `time.monotonic`) none is begun any more
    once `at_least` have been. `complete` is called from several threads. `on_end` is called after each, one at a time.

    What is raised in a worker, or Ctrl-C, ends the others at their next turn, and is raised here.
    """
    desk = test.desks()
    begun = iter(range(len(questions)))
    ended: dict[int, Episode] = {}
    lock = threading.Lock()
    broken = threading.Event()

    def speak(role: str, messages: list[Message], max_tokens: int) -> Reply:
        if broken.is_set():
            raise _StoppedError
        return complete(role, messages, max_tokens)

    def work() -> None:
        try:
            while not broken.is_set():
                with lock:
                    number = next(begun, None)
                if number is None or (number >= at_least and time.monotonic() > deadline):
                    return
                episode = Episode(questions[number].text, desk(), speak, test.form, limits).run()
                with lock:
                    ended[number] = episode
                    if on_end is not None:
                        on_end(questions[number], episode)
        except _StoppedError:
            return
        except BaseException:
            broken.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(work) for _ in range(workers)]
        try:
            for task in running:
                task.result()
        finally:
            broken.set()
    asked = sorted(ended)
    return Examination(tuple(questions[i] for i in asked), tuple(ended[i] for i in asked))
