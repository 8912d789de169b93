"""A replica's end of the wire: does for the front what it asks of this process's engine."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from lragent.serve.engine.service import EngineService, failed
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest
from lragent.serve.replicas.wire import Answer, Ask, Cancel, Facts, Logged, Said, Stats, Submit, Wire

logger = logging.getLogger(__name__)

_STATS_S = 0.25
_MOST_MISSED = 20
"""Looks at the counters, one after another, that may fail."""


class EngineEnd:
    """Serves one front until it hangs up or the engine fails. The front is told of no fault of the engine: it sees
    this side hang up, and asks another."""

    def __init__(self, service: EngineService, wire: Wire) -> None:
        """`service` runs already."""
        self._service, self._wire = service, wire
        self._said: list[tuple[str, Chunk]] = []
        self._more = threading.Condition()
        self._compiling: dict[str, bool] = {}
        """Requests whose grammars are being compiled, and whether they were cancelled meanwhile."""
        self._lock = threading.Lock()
        """Of `_compiling`."""
        self._ended = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the engine and the front are there."""
        return self._service.alive and not self._ended.is_set()

    def begin(self) -> None:
        """Introduce the engine, and serve in threads from now on."""
        self._wire.send(facts_of(self._service))
        for work in (self._read, self._speak, self._tell_stats):
            threading.Thread(target=self._to_the_end, args=(work,), name=f"lragent{work.__name__}", daemon=True).start()

    def end(self) -> None:
        """Hang up and end the engine. May be called again."""
        self._ended.set()
        self._wire.hang_up()
        with self._more:
            self._more.notify()
        self._service.stop(drain=False, timeout_s=5.0)

    def _to_the_end(self, work: Callable[[], None]) -> None:
        """Where one of the threads ends, all do: the front would wait for ever for one that does not listen or speak,
        and can ask another."""
        try:
            work()
        except Exception:
            logger.exception("this replica cannot go on, and begins anew")
        finally:
            self.end()

    def _read(self) -> None:
        for message in self._wire.messages():
            if isinstance(message, Submit) and message.request.params.grammar is None:
                self._submit(message.request)
            elif isinstance(message, Submit):  # its grammar is compiled first, which may take a while
                with self._lock:
                    self._compiling[message.request.request_id] = False
                threading.Thread(target=self._compile, args=(message.request,), daemon=True).start()
            elif isinstance(message, Cancel):
                self._cancel(message.request_id)
            else:
                threading.Thread(target=self._answer, args=(message,), daemon=True).start()

    def _submit(self, request: GenerationRequest) -> None:
        try:
            self._service.submit(request, partial(self._say, request.request_id))
        except Exception as error:
            self._say(request.request_id, failed(request.request_id, error))

    def _compile(self, request: GenerationRequest) -> None:
        """Submit it once its grammar is compiled, unless it is cancelled by then."""
        name = request.request_id
        with contextlib.suppress(Exception):  # what is wrong with it is said where it is submitted
            self._service.check(request)
        with self._lock:
            cancelled = self._compiling[name]
        if cancelled:
            self._say(name, Chunk(finish_reason=FinishReason.CANCELLED))
        else:
            self._submit(request)
        with self._lock:
            cancelled = self._compiling.pop(name)
        if cancelled:  # perhaps while it was submitted
            self._service.cancel(name)

    def _cancel(self, name: str) -> None:
        with self._lock:
            if name in self._compiling:  # the engine does not know it yet
                self._compiling[name] = True
                return
        self._service.cancel(name)

    def _say(self, request_id: str, chunk: Chunk) -> None:
        if self._service.failure is not None:
            self._wire.hang_up()
            return
        with self._more:
            self._said.append((request_id, chunk))
            self._more.notify()

    def _speak(self) -> None:
        while not self._ended.is_set():
            with self._more:
                while not self._said and not self._ended.is_set():
                    self._more.wait()
                said, self._said = self._said, []
            self._send(Said(said))

    def _answer(self, asked: Ask) -> None:
        try:
            answer = Answer(asked.number, asked.question(self._service))
            pickle.dumps(answer)
        except Exception as fault:
            answer = Answer(asked.number, error=_travelling(fault))
        self._send(answer)

    def _tell_stats(self) -> None:
        told, missed = None, 0
        while not self._ended.wait(_STATS_S):
            try:
                stats = self._service.stats()
            except RuntimeError:  # what is counted has changed meanwhile: the next time will do
                missed += 1
                if missed == _MOST_MISSED:
                    raise
                continue
            missed = 0
            if stats != told:
                told = stats
                self._send(Stats(stats))

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the front has gone, which `_read` finds out
            self._wire.send(message)


class WireHandler(logging.Handler):
    """Sends what is logged here to the front, which writes it as it writes its own."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        names = ("name", "levelno", "levelname", "created", "msecs")
        fields = {name: getattr(record, name) for name in names} | {"msg": text, "args": None}
        with contextlib.suppress(OSError):
            self._wire.send(Logged(fields))


def facts_of(service: EngineService) -> Facts:
    """What the front must know of `service`."""
    return Facts(
        pid=os.getpid(),
        model_name=service.model_name,
        roles=service.roles,
        sharing=service.sharing,
        prefix_writer=service.prefix_writer,
        device=service.device,
        max_model_len=service.max_model_len,
        seats=service.seats,
        end_tokens=service.end_tokens,
        tokenizer=service.tokenizer,
    )


def _travelling(fault: Exception) -> Exception:
    """`fault`, or one of its words where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(fault))
    except Exception:
        return RuntimeError(f"{type(fault).__name__}: {fault}")
    return fault
