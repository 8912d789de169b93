"""A replica's end of the wire, over a tiny engine in this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
from engines import tiny_engine
from replica_fakes import wait_for

from lragent.modes import PrefixWriter
from lragent.serve.api.errors import as_api_error
from lragent.serve.engine.engine import EngineStats
from lragent.serve.engine.grammar import Grammar
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, SamplingParams
from lragent.serve.replicas.engine_end import EngineEnd
from lragent.serve.replicas.wire import Cancel, Facts, Said, Stats, Submit, Wire


class Front:
    """What a replica says, as the front hears it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.wire = Wire(Connection(ours.detach()))
        chat: Any = SimpleNamespace(prefix_writer=PrefixWriter.BASE)
        self.service = EngineService(tiny_engine("base_lr_shared"), chat, [], "tiny")
        self.service.start()
        self.end = EngineEnd(self.service, Wire(Connection(theirs.detach())))
        self.heard: list[Any] = []
        self.hung_up = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        self.end.begin()
        assert isinstance(wait_for(lambda: self.heard)[0], Facts)

    def _listen(self) -> None:
        for message in self.wire.messages():
            self.heard.append(message)
        self.hung_up.set()

    def submit(self, name: str, **params: Any) -> None:
        given = SamplingParams(temperature=0.0, ignore_eos=True, **params)
        self.wire.send(Submit(GenerationRequest(name, "plan", Prompt((5, 6, 7)), given)))

    def chunks(self, name: str) -> list[Chunk]:
        said = [piece for message in self.heard if isinstance(message, Said) for piece in message.pieces]
        return [chunk for request_id, chunk in said if request_id == name]

    def last(self, name: str) -> Chunk:
        def ended() -> list[Chunk]:
            return [chunk for chunk in self.chunks(name) if chunk.finish_reason is not None]

        (chunk,) = wait_for(ended)
        return chunk


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.end.end()


def test_a_cancel_that_overtakes_the_grammar_ends_the_request(front: Front) -> None:
    grammars = front.service._engine.grammars
    compiling, go_on, compile_ = threading.Event(), threading.Event(), grammars.matcher

    def held(grammar: Grammar) -> Any:
        compiling.set()
        assert go_on.wait(10)
        return compile_(grammar)

    grammars.matcher = held  # type: ignore[method-assign]
    front.submit("gone", max_tokens=400, grammar=Grammar.regex("a*"))
    assert compiling.wait(10)
    front.wire.send(Cancel("gone"))
    front.submit("after", max_tokens=2)
    assert front.last("after").finish_reason is FinishReason.LENGTH  # so the other's cancel has been read
    go_on.set()
    assert front.last("gone").finish_reason is FinishReason.CANCELLED
    assert front.service.stats().finished == 1, "nothing of it was charged"
    front.submit("stays", max_tokens=3, grammar=Grammar.regex("a*"))
    assert front.last("stays").finish_reason is FinishReason.LENGTH
    wait_for(lambda: not front.end._compiling)


@pytest.mark.parametrize("part", ["check", "_tags"])
def test_a_fault_of_a_request_is_told_as_by_one_engine(
    front: Front, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*given: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(front.service._engine, part, fail)
    front.submit("r", max_tokens=2)
    last = front.last("r")
    assert last.finish_reason is FinishReason.ERROR
    assert last.fault is not None
    told = as_api_error(last.fault)
    assert (told.status, told.code, told.message) == (500, "internal_error", as_api_error(KeyError()).message)
    assert "secret" not in f"{last.error}{last.fault}"
    assert "/secret/path" in caplog.text
    assert front.service.alive


def test_counters_that_change_while_they_are_read_are_told_the_next_time(front: Front) -> None:
    read, failed = front.service.stats, threading.Event()

    def changed() -> EngineStats:
        if failed.is_set():
            return replace(read(), finished=77)
        failed.set()
        raise RuntimeError("dictionary changed size during iteration")

    front.service.stats = changed  # type: ignore[method-assign]
    wait_for(lambda: any(isinstance(each, Stats) and each.stats.finished == 77 for each in list(front.heard)))
    assert failed.is_set()
    assert front.end.alive


def hear_nonsense(front: Front) -> None:
    front.wire._connection.send_bytes(b"no pickle")


def say_nonsense(front: Front) -> None:
    unsayable: Any = threading.Lock()
    front.end._say("any", Chunk(unsayable))


def fail_to_count(front: Front) -> None:
    front.service.stats = None  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("spoil", [hear_nonsense, say_nonsense, fail_to_count])
def test_one_that_cannot_go_on_hangs_up_and_says_why(
    front: Front, spoil: Callable[[Front], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(front)
    assert front.hung_up.wait(10)
    wait_for(lambda: not front.service.alive)
    assert not front.end.alive
    assert "cannot go on" in caplog.text
