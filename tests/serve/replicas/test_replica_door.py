"""Where replicas come in: whoever cannot, or does not speak, must not keep the others out or the server from ending."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
from replica_fakes import FACTS

from lragent.errors import LRAgentError, UserError
from lragent.serve.replicas import fleet
from lragent.serve.replicas.service import ReplicatedService
from lragent.serve.replicas.wire import Facts, Refused, connect


@pytest.fixture(autouse=True)
def _short_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def a_service(facts: Facts) -> ReplicatedService:
    return ReplicatedService(facts, 1, max_waiting=9, seed=0)


def refused_by(door: Any) -> None:
    """One comes in, and says that it cannot begin."""
    connect(door.address, door.key).send(Refused("roles: no.", mendable=True))
    with pytest.raises(UserError, match="roles: no"):
        door.wait_for_all(lambda: None)


def ends(work: Callable[[], object]) -> bool:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_a_lasting_fault_is_logged_once_and_tried_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready, waits = threading.Event(), []

    class Full(Listener):
        left = 3

        def accept(self) -> Connection:
            assert ready.wait(10)
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr(fleet, "Listener", Full)
    door = fleet._Door("front", a_service)
    monkeypatch.setattr(door._closing, "wait", waits.append)
    ready.set()
    refused_by(door)
    assert len(waits) == 3
    assert min(waits) > 0
    assert caplog.text.count("Too many open files") == 1
    door.close()


def test_who_has_no_key_is_not_let_in() -> None:
    door = fleet._Door("front", a_service)
    with pytest.raises((OSError, EOFError, fleet.AuthenticationError)):
        connect(door.address, b"another")
    refused_by(door)
    door.close()
    with pytest.raises(FileNotFoundError):
        connect(door.address, door.key)


def test_one_that_comes_in_and_says_nothing_does_not_keep_it_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_STOP_S", 0.05)
    door = fleet._Door("front", a_service)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(door.address)
        assert silent.recv(1), "it is asked for the key"
        assert ends(door.close)
    assert ends(door._accepting.join)


def test_a_replica_that_cannot_be_used_is_told() -> None:
    def fail(facts: Facts) -> ReplicatedService:
        raise ValueError("of another kind")

    door = fleet._Door("front", fail)
    connect(door.address, door.key).send(FACTS)
    with pytest.raises(LRAgentError, match="of another kind"):
        door.wait_for_all(lambda: None)
    door.close()
