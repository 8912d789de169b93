"""Asking many questions at once: none twice, none after the time, and a failure ends it all."""

from __future__ import annotations

import threading
import time

import pytest

from lragent.errors import LRAgentError
from lragent.eval.agent import Limits, Message, Reply
from lragent.eval.examine import examine
from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.oracle import Oracle
from lragent.eval.world.testset import TestSet


@pytest.fixture(scope="module")
def test() -> TestSet:
    return make_data_set(with_counts(LEVELS["demo"], 1, 1, 12), seed=0).test


class Oracles:
    """An oracle per question, told apart by the question in the messages; safe for several threads."""

    def __init__(self, test: TestSet) -> None:
        self._test = test
        self._oracles: dict[str, Oracle] = {}
        self.asked: set[str] = set()

    def __call__(self, role: str, messages: list[Message], max_tokens: int) -> Reply:
        text = next(message["content"] for message in messages if message["role"] == "user")
        if text not in self._oracles:
            question = next(question for question in self._test.questions if question.text == text)
            self._oracles[text] = Oracle(self._test.world, question, self._test.form)
            self.asked.add(text)
        return self._oracles[text](role, messages, max_tokens)


def test_every_question_is_asked_once_and_told_once(test: TestSet) -> None:
    told: list[str] = []
    done = examine(
        test,
        test.questions,
        Oracles(test),
        Limits(),
        workers=4,
        on_end=lambda question, episode: told.append(question.text),
    )
    assert done.questions == test.questions
    assert sorted(told) == sorted(question.text for question in test.questions)
    assert (done.score.overall.correct, done.score.overall.total) == (12, 12)


def test_none_is_begun_after_the_time_but_the_least(test: TestSet) -> None:
    past = time.monotonic() - 1
    done = examine(test, test.questions, Oracles(test), Limits(), workers=3, at_least=5, deadline=past)
    assert done.questions == test.questions[:5]
    none = examine(test, test.questions, Oracles(test), Limits(), workers=3, deadline=past)
    assert (none.questions, none.score.overall.total) == ((), 0)


def test_a_failure_ends_the_others(test: TestSet) -> None:
    both = threading.Barrier(2)
    calls: list[str] = []

    def broken(role: str, messages: list[Message], max_tokens: int) -> Reply:
        calls.append(role)
        if len(messages) == 2:
            both.wait(20)  # two trajectories have begun
        if messages[1]["content"] == test.questions[0].text:
            raise LRAgentError("gone")
        time.sleep(0.05)
        return Reply("nonsense")

    with pytest.raises(LRAgentError, match="gone"):
        examine(test, test.questions, broken, Limits(iterations=1_000), workers=2)
    assert len(calls) < 10
