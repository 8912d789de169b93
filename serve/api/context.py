"""What every endpoint is given: the engine service, and the limits of this server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from lragent.serve.api.access import Caller, caller_of
from lragent.serve.api.metering import Call, Meter
from lragent.serve.api.metrics import Latencies
from lragent.serve.api.service import Service
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.token_text import TokenText
from lragent.serve.ledger.ledger import Ledger

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """One app's surroundings, handed to every endpoint."""

    service: Service
    settings: ServeSettings
    meter: Meter
    latencies: Latencies
    ledger: Ledger | None
    created: int
    """Unix time at which the app was made: the `created` of the model cards."""
    token_text: TokenText
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses the tokenizer, off the event loop; one at a time: tokenizers are not thread-safe."""
        async with self.tokenizing:
            return await asyncio.to_thread(work)

    def call(self, request: Request, endpoint: str, trajectory: str | None, *, asks_length: bool) -> Call:
        """`request` as the ledger knows it."""
        caller = caller_of(request)
        return Call(endpoint, caller.key, trajectory or "", caller.arrived, asks_length)

    def salt(self, caller: Caller, given: str) -> str:
        """Under which the cache of a request is kept: what the client says, and, where keys are tenants, its key."""
        if not caller.key or self.settings.tenants == "salt":
            return given
        return hashlib.sha256(f"{caller.key}\0{given}".encode()).hexdigest()
