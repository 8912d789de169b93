"""What the front and a replica say to each other, and the socket on which they say it.

A replica connects to the front's Unix socket, in a folder that only this user can enter, and shows a key that only the
front's own children know. All that an engine says in one step travels as one message: Ray's own calls take a
quarter of a millisecond for each piece of an answer, which is more than HTTP does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.engine import EngineStats
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import Chunk, GenerationRequest, RoleCard


@dataclass(frozen=True)
class Facts:
    """What the front must know of an engine. seats: requests that it runs at once. pid: of its process."""

    pid: int
    model_name: str
    roles: Sequence[RoleCard]
    sharing: SharingMode
    prefix_writer: PrefixWriter
    device: str
    max_model_len: int
    seats: int
    end_tokens: frozenset[int]
    tokenizer: Any


@dataclass(frozen=True)
class Refused:
    """A replica could not begin. mendable: whether `message` is for the user, who can mend it."""

    message: str
    mendable: bool


@dataclass(frozen=True)
class Submit:
    """To the replica: serve this."""

    request: GenerationRequest


@dataclass(frozen=True)
class Cancel:
    """To the replica: end it; one that has ended is ignored."""

    request_id: str


@dataclass(frozen=True)
class Ask:
    """To the replica: answer under this number what `question`, which can be pickled, says of its service."""

    number: int
    question: Callable[[EngineService], Any]


@dataclass(frozen=True)
class Answer:
    """Of an `Ask`. error: what it raised."""

    number: int
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class Said:
    """From the replica: pieces of answers by request, in order; all that has come up since the last."""

    pieces: Sequence[tuple[str, Chunk]]


@dataclass(frozen=True)
class Stats:
    """From the replica, a few times a second while they change."""

    stats: EngineStats


@dataclass(frozen=True)
class Logged:
    """A line of the replica's log. fields: of a `logging.LogRecord`."""

    fields: dict[str, Any]

    def write(self, who: str) -> None:
        """To this process's log, as said by `who`."""
        record = logging.makeLogRecord(self.fields)
        record.msg = f"[{who}] {record.msg}"
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


class Wire:
    """One connection. Anybody may send; one thread reads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError where the other side has gone."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(data)

    def messages(self) -> Iterator[Any]:
        """What the other side says, until it, or this one, has gone."""
        while True:
            try:
                data = self._connection.recv_bytes()
            except (EOFError, OSError):
                return
            yield pickle.loads(data)

    def hang_up(self) -> None:
        """Both sides' `messages` end. May be called twice."""
        # Closing alone would leave a thread that reads asleep. The lock is not taken: its holder may wait to send.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)


def connect(address: str, key: bytes) -> Wire:
    """A replica's end. Raises OSError where nobody listens at `address`, a path."""
    return Wire(Client(address, "AF_UNIX", key))
