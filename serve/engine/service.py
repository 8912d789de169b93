"""The engine in a thread of its own: requests may come from any thread or event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from lragent.adapter_set import AdapterSet
from lragent.chat import BASE
from lragent.errors import LRAgentError, UserError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.chat import ChatPrompts
from lragent.serve.engine.engine import Engine, EngineStats, EngineView
from lragent.serve.engine.outbox import Outbox, as_one, handed_over
from lragent.serve.engine.role_weights import PreparedRole
from lragent.serve.engine.types import (
    Chunk,
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    QueueFullError,
    ReplicaState,
    RoleCard,
    UnknownRoleError,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)


class EngineService:
    """Owns the engine and its thread. Everything here may be called from any thread."""

    def __init__(self, engine: Engine, chat: ChatPrompts, roles: list[RoleCard], model_name: str) -> None:
        self.chat = chat
        self.roles = roles
        """The base first. Replaced as a whole, never changed."""
        self.model_name = model_name
        self.failure: str | None = None
        self.replicas: tuple[ReplicaState, ...] = ()
        """There is but this engine."""
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._pending = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="lragent-engine", daemon=True)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._engine.limits.max_context

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Not thread-safe."""
        return self._engine.tokenizer

    @property
    def sharing(self) -> SharingMode:
        """The sharing mode, chosen at start."""
        return self._engine.sharing

    @property
    def seats(self) -> int:
        """Requests that run at once."""
        return self._engine.seats

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return self._engine.end_tokens

    @property
    def device(self) -> str:
        """Where the model is, as torch calls it."""
        return self._engine.device

    @property
    def prefix_writer(self) -> PrefixWriter:
        """Who writes what comes before the first turn."""
        return self.chat.prefix_writer

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive() and self.failure is None and not self._stopping.is_set()

    def start(self, *, freeze: bool = False) -> None:
        """Begin to serve. freeze: this process does nothing else, so what is in its memory now stays, and garbage
        collection, which would hold the engine up, never looks through it again."""
        if freeze:
            gc.collect()
            gc.freeze()
        self._thread.start()

    def stop(self, drain: bool = True, timeout_s: float = 30.0) -> None:
        """Take no more requests; finish those that run if `drain`, else cancel them; end the thread."""
        if not self._thread.is_alive():
            return
        with self._lock:  # whatever was submitted before is in the inbox by now
            self._stopping.set()
        self._inbox.put(_wake if drain else self._engine.cancel_all)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._inbox.put(self._engine.cancel_all)
            self._thread.join(timeout_s)

    def check(self, request: GenerationRequest) -> None:
        """Raises UserError where `request` cannot be served."""
        self._engine.check(request)

    def submit(self, request: GenerationRequest, on_chunk: Callable[[Chunk], None]) -> None:
        """Queue a request; `on_chunk` is called from the engine's thread and must not block.

        Raises UserError, UnknownRoleError, QueueFullError, EngineDeadError.
        """
        self._engine.check(request)
        with self._lock:
            if not self.alive:
                raise EngineDeadError(f"The engine does not run{f': {self.failure}' if self.failure else ''}.")
            if self._pending >= self._engine.limits.max_waiting:
                raise QueueFullError(f"{self._pending} requests are open already; try again later.")
            self._pending += 1
            self._inbox.put(partial(self._begin, request, on_chunk))

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended already is ignored."""
        self._inbox.put(partial(self._engine.cancel, request_id))

    def generate(self, request: GenerationRequest, watch: Callable[[Chunk], None] | None = None) -> Chunk:
        """The whole answer as one chunk; `watch` is called from the engine's thread with each piece of it.

        Raises as `submit`, EngineDeadError if the engine fails meanwhile, and what `watch` raises; that ends it.
        """
        parts: list[Chunk] = []
        faults: list[Exception] = []
        ended = threading.Event()  # one wake-up for an answer, not one for each of its tokens

        def take(chunk: Chunk) -> None:
            parts.append(chunk)
            try:
                if watch is not None and not faults:
                    watch(chunk)
            except Exception as fault:
                faults.append(fault)
                ended.set()
            if chunk.finish_reason is not None:
                ended.set()

        self.submit(request, take)
        try:
            ended.wait()
        finally:
            self.cancel(request.request_id)  # where it was interrupted
        if faults:
            raise faults[0]
        return joined(parts)

    def stream(
        self, request: GenerationRequest, watch: Callable[[Chunk], None] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """The answer piece by piece. Leaving the iteration early cancels the request. Raises as `submit`, at once.

        watch: called from the engine's thread with each piece, the last too, whether anybody listens or not.
        """
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()

        def hand_over(chunk: Chunk) -> None:
            if watch is not None:
                watch(chunk)
            self._outbox.put(loop, chunks, chunk)

        self.submit(request, hand_over)
        return handed_over(chunks, partial(self.cancel, request.request_id))

    def ask(self, question: Callable[[Engine], T]) -> Future[T]:
        """What `question` says of the engine, in its own thread between two steps; it must be quick.

        The answer is EngineDeadError where the engine has failed. Cancelled before its turn has come, it is not asked.
        """
        answer: Future[T] = Future()

        def put() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                if self.failure is not None:
                    raise EngineDeadError(f"The engine does not run: {self.failure}.")
                answer.set_result(question(self._engine))
            except Exception as fault:
                answer.set_exception(fault)

        with self._lock:
            if not self.alive:
                raise EngineDeadError(f"The engine does not run{f': {self.failure}' if self.failure else ''}.")
            self._inbox.put(put)
        return answer

    def prepare_role(self, adapters: AdapterSet, role: str, *, name: str, root: str) -> PreparedRole:
        """See RoleWeights.prepare. Takes a moment; nothing that runs waits for it."""
        if self._engine.weights is None:
            raise UserError("roles: this server was started without roles, so it has no A that others could share.")
        return self._engine.weights.prepare(adapters, role, name=name, root=root)

    def load_role(self, prepared: PreparedRole) -> Future[None]:
        """Serve a role from now on, under a name that may be another's. Requests that run are not disturbed.

        The answer is RoleRoomError where no place is free.
        """

        def put(engine: Engine) -> None:
            engine.put_role(prepared)
            card = RoleCard(prepared.name, self.model_name, prepared.root, prepared.digest)
            self.roles = [*(each for each in self.roles if each.name != card.name), card]

        return self.ask(put)

    def unload_role(self, name: str) -> Future[None]:
        """Serve a role no longer. Its requests that run go on to their end. The answer is UnknownRoleError where it is
        not loaded."""

        def drop(engine: Engine) -> None:
            if name not in engine.roles.named or name == BASE:
                raise UnknownRoleError(f"lora_name: {name!r} is not loaded.")
            engine.drop_role(name)
            self.roles = [each for each in self.roles if each.name != name]

        return self.ask(drop)

    async def views(self, most: int) -> list[EngineView]:
        """See Engine.view; of the one engine."""
        return [await asyncio.wrap_future(self.ask(lambda engine: engine.view(most)))]

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters; they may be one step apart from each other."""
        return self._engine.stats()

    def _loop(self) -> None:
        try:
            while self._receive():
                self._engine.step()
                self._outbox.deliver()
        except Exception as fault:
            logger.exception("the engine has failed")
            with self._lock:  # from here on nothing more is put into the inbox by submit
                self.failure = f"{type(fault).__name__}: {fault}"
            self._engine.fail_all(self.failure)
            while not self._inbox.empty():
                self._inbox.get()()
        self._outbox.deliver()

    def _receive(self) -> bool:
        """Do what was asked meanwhile; waits if there is nothing to step. False when it is time to end."""
        while True:
            self._outbox.deliver()
            try:
                action = self._inbox.get(block=not self._engine.busy and not self._stopping.is_set())
            except queue.Empty:
                return self._engine.busy
            action()

    def _begin(self, request: GenerationRequest, on_chunk: Callable[[Chunk], None]) -> None:
        def counted(chunk: Chunk) -> None:
            if chunk.finish_reason is not None:
                with self._lock:
                    self._pending -= 1
            on_chunk(chunk)

        try:
            if self.failure is not None:
                raise EngineDeadError(self.failure)
            self._engine.add(request, counted)
        except Exception as error:  # a request's failure ends that request only
            try:
                counted(failed(request.request_id, error))
            except Exception:
                logger.exception("the receiver of %s has failed", request.request_id)


def _wake() -> None:
    """Nothing to do: the engine's thread only looks up."""


def failed(request_id: str, error: Exception) -> Chunk:
    """The end of a request that `error` keeps from beginning. What nobody raised on purpose is for the log alone."""
    fault = error
    if not isinstance(fault, LRAgentError):
        logger.error("request %s could not be begun", request_id, exc_info=error)
        fault = LRAgentError("The engine failed on this request; its log says why.")
        fault.__cause__ = error  # for callers in this process
    return Chunk(finish_reason=FinishReason.ERROR, error=str(fault), fault=fault)


def joined(chunks: list[Chunk]) -> Chunk:
    """An answer's chunks as one. Raises EngineDeadError if the engine failed, and what was wrong with the request."""
    last = chunks[-1]
    if last.fault is not None:
        raise last.fault
    if last.finish_reason is FinishReason.ERROR:
        raise EngineDeadError(last.error or "The request failed.")
    return as_one(chunks)
