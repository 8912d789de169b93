"""What every endpoint is given: the engine service, and the limits of this server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from lragent.serve.engine.token_text import TokenText
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, RoleCard

T = TypeVar("T")


class ChatPrompter(Protocol):
    """Turns messages into a context in tokens; `lragent.serve.engine.chat.ChatPrompts` is the real one."""

    def prepare(self, messages: Sequence[Mapping[str, Any]], role: str, salt: str) -> Prompt:
        """Render `messages` with an opened turn of `role`. Raises UserError naming the message that is wrong."""
        ...


class Service(Protocol):
    """The part of `lragent.serve.engine.service.EngineService` that HTTP needs."""

    @property
    def alive(self) -> bool: ...

    @property
    def failure(self) -> str | None:
        """How the engine ended; None while it lives."""
        ...

    @property
    def roles(self) -> Sequence[RoleCard]:
        """The base first."""
        ...

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def chat(self) -> ChatPrompter: ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Submit, then yield chunks to the last. Closing it, or cancelling the task that waits on it, cancels the
        request. Raises, before the first chunk, UserError, UnknownRoleError, QueueFullError or EngineDeadError."""
        ...

    def stop(self, drain: bool, timeout_s: float) -> None:
        """End the engine thread; with `drain`, after the open requests. May be called twice."""
        ...


@dataclass(frozen=True)
class Context:
    """One app's surroundings, handed to every endpoint."""

    service: Service
    max_body_bytes: int
    created: int
    """Unix time at which the app was made: the `created` of the model cards."""
    token_text: TokenText
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses the tokenizer, off the event loop; one at a time: tokenizers are not thread-safe."""
        async with self.tokenizing:
            return await asyncio.to_thread(work)
