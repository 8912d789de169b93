"""What HTTP needs of the engine's service."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from lragent.adapter_set import AdapterSet
from lragent.chat_tools import ToolForm
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.engine import EngineStats, EngineView
from lragent.serve.engine.role_weights import PreparedRole
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, ReplicaState, RoleCard


class ChatPrompter(Protocol):
    """Turns messages into a context in tokens; `lragent.serve.engine.chat.ChatPrompts` is the real one."""

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], role: str, salt: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Prompt:
        """Render `messages` with an opened turn of `role`. Raises UserError naming the message that is wrong."""
        ...

    def tool_form(self) -> ToolForm:
        """How this model writes calls. Raises UserError where it does not."""
        ...

    def remember_as(self, prompt: Prompt, text: str, other: str) -> None:
        """The answer `text` to `prompt` may come back as `other`."""
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
    def sharing(self) -> SharingMode: ...

    @property
    def prefix_writer(self) -> PrefixWriter: ...

    @property
    def device(self) -> str:
        """Where the model is, as torch calls it."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def chat(self) -> ChatPrompter: ...

    def check(self, request: GenerationRequest) -> None:
        """Raises UserError where `request` cannot be served; a new grammar is compiled here."""
        ...

    def stream(
        self, request: GenerationRequest, watch: Callable[[Chunk], None] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Submit at once, then yield chunks to the last. Closing it, or cancelling the task that waits on it, cancels
        the request. watch: sees every chunk, from another thread, even when nobody listens any more. Raises UserError,
        UnknownRoleError, QueueFullError or EngineDeadError."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request; one that has ended already is ignored."""
        ...

    def stats(self) -> EngineStats:
        """Counters, and what is going on now."""
        ...

    @property
    def replicas(self) -> Sequence[ReplicaState]:
        """The engines behind this service; none where it is but one, in this process."""
        ...

    async def views(self, most: int) -> list[EngineView]:
        """The cache of each engine that lives, at most `most` nodes of it."""
        ...

    def prepare_role(self, adapters: AdapterSet, role: str, *, name: str, root: str) -> PreparedRole:
        """A role in the form in which it is loaded. Raises UserError where it does not fit."""
        ...

    def load_role(self, prepared: PreparedRole) -> Future[None]:
        """Serve it from the next step on."""
        ...

    def unload_role(self, name: str) -> Future[None]:
        """Serve it no longer."""
        ...

    def stop(self, drain: bool, timeout_s: float) -> None:
        """End the engine thread; with `drain`, after the open requests. May be called twice."""
        ...
