"""Questions put to a team: those that are missing only, while there is time, by an engine that then is gone."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.errors import LRAgentError, UserError
from lragent.eval import ask as asks
from lragent.eval.agent import Message, Reply
from lragent.eval.answers import Answer, AnswerFile, read_answers
from lragent.eval.ask import Asking, ask, served, unanswered
from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.oracle import Oracle
from lragent.eval.world.testset import TestSet
from lragent.modes import SharingMode
from lragent.pack import write_pack

FEW = Asking(workers=2, iterations=8, max_tokens_in_cache=4_000)


@pytest.fixture(scope="module")
def test() -> TestSet:
    return make_data_set(with_counts(LEVELS["demo"], 1, 1, 6), seed=0).test


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and packs of a whole team, and of one without reflect."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "tiny")
    write_pack(folder / "team.safetensors", make_adapter_set(tiny_model()))
    write_pack(folder / "two.safetensors", make_adapter_set(tiny_model(), ("plan", "action")))
    return folder


class Oracles:
    """A team that knows everything, and remembers what it was asked; `fails_at` a question it breaks down."""

    def __init__(self, test: TestSet, fails_at: str | None = None) -> None:
        self._test, self._fails_at = test, fails_at
        self._oracles: dict[str, Oracle] = {}
        self.asked: list[str] = []

    def __call__(self, role: str, messages: list[Message], max_tokens: int) -> Reply:
        text = next(message["content"] for message in messages if message["role"] == "user")
        question = next(question for question in self._test.questions if question.text == text)
        if question.id == self._fails_at:
            raise LRAgentError("broken")
        if text not in self._oracles:
            self._oracles[text] = Oracle(self._test.world, question, self._test.form)
            self.asked.append(question.id)
        return self._oracles[text](role, messages, max_tokens)


def test_only_what_is_missing_is_asked(test: TestSet, tmp_path: Path) -> None:
    told: list[Answer] = []
    with AnswerFile(tmp_path / "a.jsonl") as file:
        ask(test, 2, Oracles(test), file, FEW)
        more = Oracles(test)
        ask(test, 5, more, file, FEW, on_answer=lambda answer, episode: told.append(answer))
        assert sorted(more.asked) == sorted(answer.id for answer in told) == [f"test-{n}" for n in (2, 3, 4)]
        assert [question.id for question in unanswered(test, 9, file)] == ["test-5"]
    found = read_answers(tmp_path / "a.jsonl")
    assert set(found) == {f"test-{n}" for n in range(5)}
    assert all(answer.right for answer in found.values())


def test_after_the_time_none_is_begun(test: TestSet, tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as file:
        ask(test, 6, Oracles(test), file, FEW, deadline=time.monotonic() - 1)
        assert not file.answers


def test_what_was_answered_before_a_failure_is_kept(test: TestSet, tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as file:
        with pytest.raises(LRAgentError, match="broken"):
            ask(test, 6, Oracles(test, "test-3"), file, Asking(workers=1))
        assert list(file.answers) == ["test-0", "test-1", "test-2"]
        ask(test, 6, Oracles(test), file, FEW)
    assert len(read_answers(tmp_path / "a.jsonl")) == 6


def test_an_engine_is_gone_after_its_block_whoever_keeps_what_it_gave(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    class Watched(asks.Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(weakref.ref(self))
            made.append(weakref.ref(self._service._engine))

    monkeypatch.setattr(asks, "Engine", Watched)
    with served(str(place / "tiny"), place / "team.safetensors", SharingMode.BASE_LR_SHARED, FEW) as complete:
        reply = complete("plan", [{"role": "user", "content": "where?"}], 4)
    assert reply.tokens_computed
    assert reply.ttft_s is not None
    assert reply.total_s is not None
    assert 0 < reply.ttft_s <= reply.total_s
    assert [ref() for ref in made] == [None, None]
    del complete
    gc.collect()


def test_a_team_that_lacks_a_role_is_refused_at_once(place: Path) -> None:
    with (
        pytest.raises(UserError, match=r"two\.safetensors: has no role 'reflect'"),
        served(str(place / "tiny"), place / "two.safetensors", SharingMode.NON_SHARED, FEW),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "workers: must be at least 1"),
        ({"workers": 1_025}, "workers: must be at most 1024"),
        ({"iterations": 0}, "iterations: must be at least 1"),
        ({"max_tokens_in_cache": 0}, "max_tokens_in_cache: must be at least 1"),
    ],
)
def test_how_questions_are_asked_is_checked(options: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Asking(**options)
