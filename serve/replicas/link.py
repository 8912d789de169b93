"""The front's end of one replica: its open requests, the questions put to it, and what it last said of itself."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, cast

from lragent.serve.engine.engine import EngineStats
from lragent.serve.engine.outbox import Outbox
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import Chunk, GenerationRequest, ReplicaLostError
from lragent.serve.replicas.wire import Answer, Ask, Cancel, Facts, Logged, Said, Stats, Submit, Wire

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Who waits for the answer to one request; told by the link's reading thread."""

    def take(self, chunk: Chunk, outbox: Outbox) -> None:
        """The next piece. `outbox` is delivered soon after."""
        ...

    def lost(self, outbox: Outbox) -> None:
        """The replica has gone before the last piece."""
        ...


class Link:
    """A replica that has begun. number: never used twice. All but `read` may be called from any thread."""

    def __init__(self, wire: Wire, facts: Facts, number: int, place: int) -> None:
        self.facts = facts
        self.number = number
        self.place = place
        self.stats = EngineStats()
        """As it last told."""
        self.forgotten = False
        """Whether it has gone, and is given nothing more."""
        self._wire = wire
        self._lock = threading.Lock()
        self._gone = False
        self._open: dict[str, Listener] = {}
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def open(self) -> int:
        """Requests that it has been given and has not ended."""
        return len(self._open)

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Raises ReplicaLostError where it has gone; then `listener` is told nothing."""
        with self._lock:
            if self._gone:
                raise _lost()
            self._open[request.request_id] = listener
        self._outgoing.put(Submit(request))

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended is ignored."""
        self._outgoing.put(Cancel(request_id))

    def ask(self, question: Callable[[EngineService], T]) -> Future[T]:
        """What `question`, which is sent there, says of the replica's service. ReplicaLostError where it has gone."""
        answer: Future[T] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._gone:
                answer.set_exception(_lost())
                return answer
            self._asked[number] = answer
        self._outgoing.put(Ask(number, question))
        return answer

    def hang_up(self) -> None:
        """`read` ends, and the replica too."""
        self._wire.hang_up()

    def write(self) -> None:
        """Send what is to be said, until `read` has ended. In a thread of its own: a replica that does not listen for
        a while must not keep those waiting who speak to others."""
        while (message := self._outgoing.get()) is not None:
            try:
                self._wire.send(message)
            except OSError:
                self.hang_up()  # `read` finds out, and tells
            except Exception:
                logger.exception("replica %d cannot be told what it is asked, and begins anew", self.place)
                self.hang_up()

    def read(self, gone: Callable[[], None]) -> None:
        """Hand out what the replica says, until it has gone; then call `gone`, and tell everybody who waits."""
        outbox = Outbox()
        try:
            for message in self._wire.messages():
                self._take(message, outbox)
                outbox.deliver()
        except Exception:
            logger.exception("replica %d has said what cannot be taken, and begins anew", self.place)
            self.hang_up()
        gone()
        self._outgoing.put(None)
        with self._lock:
            self._gone = True
            listeners, self._open = list(self._open.values()), {}
            asked, self._asked = list(self._asked.values()), {}
        for listener in listeners:
            try:
                listener.lost(outbox)
            except Exception:
                logger.exception("a request of replica %d could not be told that it is lost", self.place)
        for answer in asked:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(_lost())
        outbox.deliver()

    def _take(self, message: Any, outbox: Outbox) -> None:
        if isinstance(message, Said):
            for request_id, chunk in message.pieces:
                ended = chunk.finish_reason is not None
                listener = self._open.pop(request_id, None) if ended else self._open.get(request_id)
                if listener is not None:
                    self._tell(listener, request_id, chunk, outbox)
        elif isinstance(message, Stats):
            self.stats = message.stats
        elif isinstance(message, Answer):
            answer = self._asked.pop(message.number)
            if not answer.set_running_or_notify_cancel():
                return  # nobody waits any more
            if message.error is None:
                answer.set_result(message.value)
            else:
                answer.set_exception(message.error)
        else:
            cast(Logged, message).write(f"replica {self.place}")

    def _tell(self, listener: Listener, request_id: str, chunk: Chunk, outbox: Outbox) -> None:
        """As the engine does: the request of whoever fails to take a piece is cancelled, and nobody else notices."""
        try:
            listener.take(chunk, outbox)
        except Exception:
            logger.exception("the receiver of %s has failed", request_id)
            if chunk.finish_reason is None:
                self.cancel(request_id)


def _lost() -> ReplicaLostError:
    return ReplicaLostError("The replica that ran this request has ended; send the request again.")
