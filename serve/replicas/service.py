"""Several replicas as the one service that HTTP knows: who gets a request, and what becomes of it where one goes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from lragent.adapter_set import AdapterSet
from lragent.chat import Renderer
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.chat import ChatPrompts
from lragent.serve.engine.engine import EngineStats, EngineView
from lragent.serve.engine.outbox import Outbox, as_one, handed_over
from lragent.serve.engine.role_weights import PreparedRole
from lragent.serve.engine.turns import TurnMemory
from lragent.serve.engine.types import (
    Chunk,
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    NoReplicaError,
    Prompt,
    QueueFullError,
    ReplicaLostError,
    ReplicaState,
    RoleCard,
)
from lragent.serve.replicas.affinity import Affinity, Load
from lragent.serve.replicas.link import Link
from lragent.serve.replicas.roles import LoadedRoles
from lragent.serve.replicas.sums import added, counters_of
from lragent.serve.replicas.wire import Facts, Wire

logger = logging.getLogger(__name__)

MOST_TRIES = 3
"""Replicas to which one request is given: were it the request that ends them, it must not end them all."""
_ANY_PROMPT = Prompt((0,))


class ReplicatedService:
    """What `lragent.serve.api.service.Service` asks for, over replicas that come and go.

    The front holds all that is one: prompts and what is remembered of turns, the queue's bound, which roles are loaded.
    A replica holds an engine and its cache.
    """

    def __init__(self, facts: Facts, places: int, max_waiting: int, seed: int) -> None:
        """facts: of the first replica; the others are built from the same. places: how many there shall be. seed: for
        the draws of requests without one: they must not depend on the replica."""
        self.model_name: str = facts.model_name
        self.sharing: SharingMode = facts.sharing
        self.prefix_writer: PrefixWriter = facts.prefix_writer
        self.device: str = facts.device
        self.max_model_len: int = facts.max_model_len
        self.tokenizer: Any = facts.tokenizer
        self._turns = TurnMemory()
        self.chat = ChatPrompts(Renderer(facts.tokenizer), self._turns, facts.sharing, facts.prefix_writer)
        self._ends = facts.end_tokens
        self._loaded = LoadedRoles(facts.roles)
        self._max_waiting = max_waiting
        self._seed = seed
        self._affinity = Affinity()
        self._lock = threading.Lock()
        """Of everything below."""
        self._links: dict[int, Link] = {}
        self._starts = [0] * places
        self._left = [0] * places
        self._next_number = 0
        self._runs: dict[str, _Run] = {}
        self._ended = EngineStats()
        """Counters of replicas that have gone."""
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether any replica can serve."""
        return bool(self._links) and not self._stopping

    @property
    def failure(self) -> str | None:
        """Why none can."""
        if self._links or self._stopping:
            return None
        return str(NoReplicaError())

    @property
    def roles(self) -> Sequence[RoleCard]:
        """The base first."""
        return self._loaded.cards

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        """By their places, those that have gone too."""
        with self._lock:
            here = {link.place: link for link in self._links.values()}
            return tuple(
                ReplicaState(str(place), place in here, here[place].open if place in here else 0, starts, left)
                for place, (starts, left) in enumerate(zip(self._starts, self._left, strict=True))
            )

    def run(self, wire: Wire, facts: Facts, begun: Callable[[], None]) -> None:
        """Use the replica at the other end of `wire` until it has gone; `begun` is called once it serves. Blocks: each
        has a thread of its own."""
        with self._loaded.lock:  # no role may come or go between its catching up and its first request
            with self._lock:
                place = self._free_place()
                if place is None:
                    logger.warning("a replica comes before the one that it replaces has gone; it is sent away")
                    wire.hang_up()
                    return
                link = Link(wire, facts, self._next_number, place)
                self._next_number += 1
            reading = threading.Thread(target=self._read, args=(link,), name=f"lragent-replica-{place}", daemon=True)
            reading.start()
            threading.Thread(target=link.write, name=f"lragent-to-replica-{place}", daemon=True).start()
            try:
                self._loaded.catch_up(link)
            except Exception:
                logger.exception("replica %d could not be given the roles that were loaded meanwhile", place)
                link.hang_up()
                reading.join()
                return
            with self._lock:
                if link.forgotten:  # it went before it could be listed
                    return
                self._links[link.number] = link
                self._starts[place] += 1
        logger.info("replica %d serves in process %d", place, facts.pid)
        begun()
        reading.join()

    def check(self, request: GenerationRequest) -> None:
        """Raises UserError where `request` cannot be served; a new grammar is compiled here. Its prompt is looked at
        where it is submitted: a long one need not travel twice."""
        asked = replace(request, prompt=_ANY_PROMPT)
        for tries in range(1, MOST_TRIES + 1):
            with self._lock:
                link = next(iter(self._links.values()), None)
            if link is None:
                raise self._none()
            try:
                link.ask(partial(_check, asked)).result()
                return
            except ReplicaLostError:
                if tries == MOST_TRIES:
                    raise

    def stream(
        self, request: GenerationRequest, watch: Callable[[Chunk], None] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """See Service. Where its replica goes, a request of which nothing was told is run again on another; `watch`
        may then see some pieces twice, but only one last piece.

        What is wrong with it is the `fault` of the last chunk. Raises QueueFullError and EngineDeadError at once.
        """
        chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        run = _Run(self, self._seeded(request), asyncio.get_running_loop(), chunks, watch)
        with self._lock:
            if len(self._runs) >= self._max_waiting:
                raise QueueFullError(f"{len(self._runs)} requests are open already; try again later.")
            self._runs[request.request_id] = run
        try:
            self.place(run)
        except BaseException:
            self.ended(run)
            raise
        return handed_over(chunks, partial(self.cancel, request.request_id))

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended already is ignored."""
        run = self._runs.get(request_id)
        if run is not None:
            run.cancelled = True
            if run.link is not None:
                run.link.cancel(request_id)

    async def views(self, most: int) -> list[EngineView]:
        """Of each replica that lives."""
        with self._lock:
            links = list(self._links.values())
        asked = [asyncio.wrap_future(link.ask(partial(_view, most))) for link in links]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [view for view in found if not isinstance(view, BaseException)]

    def stats(self) -> EngineStats:
        """Sums over the replicas, a quarter of a second old at most; counters of those that have gone stay in."""
        with self._lock:
            return added([self._ended, *(link.stats for link in self._links.values())])

    def prepare_role(self, adapters: AdapterSet, role: str, *, name: str, root: str) -> PreparedRole:
        """On every replica; see LoadedRoles. Raises UserError where it does not fit."""
        with self._loaded.lock:
            return self._loaded.prepare(self._live(), adapters, role, name, root)

    def load_role(self, prepared: PreparedRole) -> Future[None]:
        """On every replica, those that begin later too. Waits for all of them."""
        return self._changed(lambda: self._loaded.load(self._live(), prepared, self.model_name))

    def unload_role(self, name: str) -> Future[None]:
        """On every replica, those that begin later too. Waits for all of them."""
        return self._changed(lambda: self._loaded.unload(self._live(), name))

    def stop(self, drain: bool, timeout_s: float) -> None:
        """Take no more requests; finish those that run if `drain`, else cancel them; hang up. May be called twice."""
        with self._lock:
            self._stopping = True
        for cancel in (False, True) if drain else (True,):
            if cancel:
                for request_id in list(self._runs):
                    self.cancel(request_id)
            end = time.monotonic() + timeout_s
            while self._runs and time.monotonic() < end:
                time.sleep(0.02)
        for link in self._live():
            link.hang_up()

    def place(self, run: _Run) -> None:
        """Give `run` to the replica that holds its cache, or to another. Raises EngineDeadError where there is none."""
        while True:
            with self._lock:
                if self._stopping or not self._links:
                    raise self._none()
                loads = {number: Load(link.open, link.facts.seats) for number, link in self._links.items()}
                chosen = self._links[self._affinity.choose(run.request.salt, run.request.prompt.ids, loads)]
            run.tries += 1
            run.link = chosen
            try:
                chosen.submit(run.request, run)
            except ReplicaLostError:
                continue  # its reading thread takes it off the list in a moment
            if run.cancelled:  # perhaps before there was a link to tell
                chosen.cancel(run.request.request_id)
            return

    def remember(self, request: GenerationRequest, whole: Chunk) -> None:
        """An answer has come to its end."""
        if request.prompt.key is not None:
            self._turns.remember_turn(request.prompt.key, whole.text, whole.token_ids, self._ends)

    def ended(self, run: _Run) -> None:
        """Nothing more is said of it."""
        with self._lock:
            self._runs.pop(run.request.request_id, None)

    def _read(self, link: Link) -> None:
        # Taken off the list before its requests are told, so that none of them is given to it again.
        link.read(partial(self._forget, link))

    def _forget(self, link: Link) -> None:
        with self._lock:
            link.forgotten = True
            if self._links.pop(link.number, None) is None:
                return
            self._affinity.lost_one()
            self._ended = added([self._ended, counters_of(link.stats)])
            self._left[link.place] += link.open
        if not self._stopping:
            becomes = "go elsewhere" if self._links else "end, for there is no other replica"
            logger.warning("replica %d has gone; open requests, which %s: %d", link.place, becomes, link.open)

    def _seeded(self, request: GenerationRequest) -> GenerationRequest:
        with self._lock:
            self._seed += 1
            seed = self._seed
        if request.params.seed is not None or request.params.temperature == 0.0:
            return request
        return replace(request, params=replace(request.params, seed=seed))

    def _live(self) -> list[Link]:
        with self._lock:
            return list(self._links.values())

    def _free_place(self) -> int | None:
        taken = {link.place for link in self._links.values()}
        return next((place for place in range(len(self._starts)) if place not in taken), None)

    def _none(self) -> EngineDeadError:
        return EngineDeadError("The server is shutting down.") if self._stopping else NoReplicaError()

    def _changed(self, change: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                with self._loaded.lock:
                    change()
                done.set_result(None)
            except Exception as fault:
                done.set_exception(fault)

        threading.Thread(target=work, name="lragent-roles", daemon=True).start()
        return done


class _Run:
    """One request on its way over replicas. Told by the reading thread of the link that it is given to."""

    def __init__(
        self,
        service: ReplicatedService,
        request: GenerationRequest,
        loop: asyncio.AbstractEventLoop,
        chunks: asyncio.Queue[Chunk],
        watch: Callable[[Chunk], None] | None,
    ) -> None:
        self.request = request
        self.link: Link | None = None
        self.tries = 0
        self.cancelled = False
        self._service, self._loop, self._chunks, self._watch = service, loop, chunks, watch
        self._parts: list[Chunk] = []

    def take(self, chunk: Chunk, outbox: Outbox) -> None:
        """See Listener."""
        self._parts.append(chunk)
        if chunk.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._service.remember(self.request, as_one(self._parts))
        if chunk.finish_reason is not None:
            self._service.ended(self)
        if self._watch is not None:
            self._watch(chunk)
        if not self.request.whole:
            outbox.put(self._loop, self._chunks, chunk)
        elif chunk.finish_reason is not None:
            outbox.put(self._loop, self._chunks, as_one(self._parts))

    def lost(self, outbox: Outbox) -> None:
        """See Listener. Nobody has seen anything of a whole answer; of a stream, what was handed over cannot be taken
        back, and another replica's words need not be the same."""
        fault: EngineDeadError = ReplicaLostError(
            "The replica that ran this request has ended, and the answer breaks off here; send the request again."
        )
        told = bool(self._parts) and not self.request.whole
        if self.cancelled:
            self.take(Chunk(finish_reason=FinishReason.CANCELLED), outbox)
            return
        if not told and self.tries < MOST_TRIES:
            self._parts.clear()
            try:
                self._service.place(self)
                return
            except EngineDeadError as none:
                fault = none
            except Exception:  # it must be told of its end none the less
                logger.exception("request %s cannot be given to another replica", self.request.request_id)
        self.take(Chunk(finish_reason=FinishReason.ERROR, error=str(fault), fault=fault), outbox)


def _check(request: GenerationRequest, service: Any) -> None:
    service.check(request)


def _view(most: int, service: Any) -> EngineView:
    view: EngineView = service.ask(lambda engine: engine.view(most)).result()
    return view
