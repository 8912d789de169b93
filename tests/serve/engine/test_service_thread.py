"""What reaches the engine's thread from others must not end it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from engines import tiny_engine

from lragent.serve.engine.service import EngineService


@pytest.fixture
def service() -> Iterator[EngineService]:
    chat: Any = None
    running = EngineService(tiny_engine("base_lr_shared"), chat, [], "tiny")
    running.start()
    yield running
    running.stop(drain=False)


def test_who_gives_up_asking_does_not_end_the_engine(service: EngineService) -> None:
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def hold(_: object) -> None:
        begun.set()
        assert go_on.wait(10)

    holding = service.ask(hold)
    assert begun.wait(10)
    given_up = service.ask(asked.append)
    assert given_up.cancel()
    assert not holding.cancel(), "it is being answered"
    go_on.set()
    assert service.ask(lambda engine: engine.seats).result(10) > 0
    assert service.failure is None
    assert not asked
