"""Requests on their way to the engine and back: budgets before, the ledger and latencies after, a limit in time."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from lragent.serve.api.errors import ApiError
from lragent.serve.api.metrics import Latencies
from lragent.serve.api.service import Service
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest
from lragent.serve.ledger.budgets import Left, Reservation
from lragent.serve.ledger.ledger import Claim, Ledger, Times

logger = logging.getLogger(__name__)

_NO_HEADER = re.compile(r"[^!-:<-~]")
"""What a name may hold and the value of a header, or this one's form, may not."""

_COMMIT_S = 5.0
"""Seconds that an answer's end waits for its entry in the ledger."""


@dataclass(frozen=True)
class Call:
    """One HTTP request, as the ledger knows it. arrived: by `time.perf_counter`. asks_length: whether it says how long
    its answers may be; where it does not, they may be as long as the context and its budgets allow."""

    endpoint: str
    key: str
    trajectory: str
    arrived: float
    asks_length: bool


class Meter:
    """What stands between the endpoints and the engine."""

    def __init__(
        self, service: Service, latencies: Latencies, ledger: Ledger | None, timeout_s: float | None = None
    ) -> None:
        self._service, self._latencies, self._ledger, self._timeout_s = service, latencies, ledger, timeout_s

    def left(self, call: Call, role: str) -> list[Left]:
        """What the budgets that concern a request of `role` have left."""
        return [] if self._ledger is None else self._ledger.left(_claim(call, role, ""))

    async def stream(self, call: Call, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """The chunks of one request; the last has its finish reason (stop or length) and usage, and comes once the
        ledger has its entry. Closing the generator cancels the request.

        Raises what `Service.stream` and `Ledger.reserve` do, what was wrong with the request, and ApiError where the
        engine gave up or time has run out.
        """
        watch = _Watch(call, request, self._latencies, self._ledger)
        request = watch.reserve()
        try:
            chunks = self._service.stream(request, watch)
        except BaseException:
            watch.never_began()
            raise
        expired = False
        timer = None
        if self._timeout_s is not None:

            def expire() -> None:
                nonlocal expired
                expired = True
                self._service.cancel(request.request_id)

            timer = asyncio.get_running_loop().call_later(self._timeout_s, expire)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk.finish_reason is not None:
                        await watch.committed()
                        if chunk.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                            raise self._failure(chunk, expired)
                    yield chunk
        finally:
            if timer is not None:
                timer.cancel()

    def _failure(self, chunk: Chunk, expired: bool) -> Exception:
        if chunk.fault is not None:
            return chunk.fault
        if expired:
            return ApiError(504, f"The request took longer than {self._timeout_s:g} seconds.", code="timeout")
        if self._service.failure is not None:
            return ApiError(503, chunk.error or "The engine has failed.", code="engine_dead")
        if chunk.finish_reason is FinishReason.CANCELLED:
            return ApiError(503, chunk.error or "The server is shutting down.", code="shutting_down")
        return ApiError(500, chunk.error or "The engine failed on this request.", code="engine_error")


def _claim(call: Call, role: str, request_id: str) -> Claim:
    return Claim(request_id, call.endpoint, call.key, role, call.trajectory)


class _Watch:
    """Sees every chunk of one request in the engine's thread, whether the client is still there or not."""

    def __init__(self, call: Call, request: GenerationRequest, latencies: Latencies, ledger: Ledger | None) -> None:
        self._call, self._request, self._latencies, self._ledger = call, request, latencies, ledger
        self._claim = _claim(call, request.role, request.request_id)
        self._reservation: Reservation | None = None
        self._first: float | None = None
        self._last = call.arrived
        self._done: Future[None] | None = None

    def reserve(self) -> GenerationRequest:
        """Set aside what it may cost. Returns the request as it may be asked."""
        request = self._request
        if self._ledger is not None:
            most = request.params.max_tokens
            asked = most if self._call.asks_length else None
            self._reservation, allowed = self._ledger.reserve(self._claim, len(request.prompt.ids), asked, most)
            if allowed != most:
                least = min(request.params.min_tokens, allowed)
                request = replace(request, params=replace(request.params, max_tokens=allowed, min_tokens=least))
        return request

    def never_began(self) -> None:
        """The engine has not taken it."""
        self._settle(Chunk())

    def __call__(self, chunk: Chunk) -> None:
        now = time.perf_counter()
        if chunk.token_ids:
            if self._first is None:
                self._first = now - self._call.arrived
                self._latencies.first_token.observe(self._first)
            else:
                self._latencies.between_tokens.observe(now - self._last)
            self._last = now
        if chunk.finish_reason is not None:
            self._latencies.whole.observe(now - self._call.arrived)
            self._latencies.finished[chunk.finish_reason] += 1
            self._settle(chunk)

    def _settle(self, chunk: Chunk) -> None:
        if self._ledger is None or self._reservation is None:
            return
        usage, finish = chunk.usage, chunk.finish_reason
        first = None if self._first is None else 1e3 * self._first
        times = Times(first, 1e3 * (time.perf_counter() - self._call.arrived))
        tools = 0 if usage is None else self._request.prompt.tool_tokens(usage.tokens_computed)
        self._done = self._ledger.settle(self._claim, self._reservation, usage, str(finish or ""), tools, times)

    async def committed(self) -> None:
        """Wait until the ledger's entry is on disk; where that fails, the log says so and the answer goes out."""
        if self._done is None or self._done.done():
            return
        try:
            # Shielded: whoever gives up waiting must not cancel what the ledger's thread is about to fulfil.
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._done)), _COMMIT_S)
        except Exception as error:
            logger.error("the ledger's entry of %s is not on disk yet: %r", self._request.request_id, error)


def budgets_body(left: list[Left]) -> list[dict[str, Any]]:
    """What budgets have left, as answers say it."""
    return [
        {
            "scope": each.budget.scope,
            "name": each.name,
            "limit": each.budget.limit,
            "left": each.left,
            "hard": each.budget.hard,
            "period": each.budget.period,
        }
        for each in left
    ]


def budgets_header(left: list[Left]) -> dict[str, str]:
    """The same in a header: how much the tightest has left, and which that is."""
    if not left:
        return {}
    tightest = min(left, key=lambda each: each.left)
    name = _NO_HEADER.sub("_", tightest.name)
    return {"x-lragent-budget-left": f"{tightest.left:.9g}; {tightest.budget.scope}={name}"}
