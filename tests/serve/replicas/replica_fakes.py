"""A service over replicas that are no processes: real sockets, and engines that do as the test says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tiny import tiny_tokenizer

from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, RoleCard, Usage
from lragent.serve.replicas.service import ReplicatedService
from lragent.serve.replicas.wire import Answer, Ask, Cancel, Facts, Said, Submit, Wire

FACTS = Facts(
    pid=1,
    model_name="org/tiny",
    roles=[RoleCard("base", None, "/models/tiny", None), RoleCard("plan", "org/tiny", "/packs/team", "digest")],
    sharing=SharingMode.BASE_LR_SHARED,
    prefix_writer=PrefixWriter.BASE,
    device="cpu",
    max_model_len=512,
    seats=8,
    end_tokens=frozenset({2}),
    tokenizer=tiny_tokenizer(),
)


class FakeReplica:
    """Keeps what it was asked; the test says what it answers."""

    def __init__(self, service: ReplicatedService, prepare: Callable[[Any], Any] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.wire = Wire(Connection(ours.detach()))
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.questions: list[Any] = []
        self.refusal: Exception | None = None
        """What every question gets."""
        begun = threading.Event()
        front = Wire(Connection(theirs.detach()))
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=service.run, args=(front, FACTS, begun.set), daemon=True).start()
        self.began = begun.wait(5)

    def _listen(self) -> None:
        for message in self.wire.messages():
            if isinstance(message, Submit):
                self.submitted.append(message.request)
            elif isinstance(message, Cancel):
                self.cancelled.append(message.request_id)
                self.say(message.request_id, Chunk(finish_reason=FinishReason.CANCELLED))
            elif isinstance(message, Ask):
                question: Any = message.question
                self.questions.append(question)
                value = "digest" if "prepare" in question.func.__name__ else None
                self.wire.send(Answer(message.number, value, self.refusal))

    @property
    def asked(self) -> list[str]:
        """The names of the questions."""
        return [question.func.__name__ for question in self.questions]

    def say(self, request_id: str, *chunks: Chunk) -> None:
        self.wire.send(Said([(request_id, chunk) for chunk in chunks]))

    def finish(self, request_id: str, text: str = "done") -> None:
        usage = Usage(3, 1, 3, 0, 0, 0)
        self.say(request_id, Chunk(text, (7,)), Chunk(finish_reason=FinishReason.STOP, usage=usage))

    def die(self) -> None:
        self.wire.hang_up()


@contextmanager
def fake_fleet(count: int = 2, **options: Any) -> Iterator[tuple[ReplicatedService, list[FakeReplica]]]:
    service = ReplicatedService(FACTS, count, **({"max_waiting": 100, "seed": 0} | options))
    replicas = [FakeReplica(service) for _ in range(count)]
    try:
        yield service, replicas
    finally:
        service.stop(drain=False, timeout_s=2.0)


def wait_for(holds: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """What `holds` returns once it is true; fails where it does not become so."""
    end = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come to hold in time"
        time.sleep(0.005)
    return found
