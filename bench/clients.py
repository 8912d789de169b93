"""Who answers a request: the same trace is played to an engine in this process or to an endpoint over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lragent.errors import LRAgentError
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, SamplingParams


@dataclass(frozen=True)
class Cost:
    """Prompt tokens of a request; None where the server does not say.

    computed: those that went through the model. base_reused, lr_reused: those whose base (or full) and LR cache was
    found.
    """

    prompt: int | None = None
    computed: int | None = None
    base_reused: int | None = None
    lr_reused: int | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    token_ids: what the context goes on with. times: seconds from the request's beginning to each token; tokens may come
    several at once. generated: how many tokens the server counted.
    """

    token_ids: tuple[int, ...]
    times: tuple[float, ...]
    generated: int
    cost: Cost


class Client(Protocol):
    """What can play a trace."""

    async def ask(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        """Exactly `answer` tokens, greedily, past any end of a turn. Raises LRAgentError where that failed."""
        ...


class InProcess:
    """An engine's service in this process. watch: called in the engine's thread with every chunk."""

    def __init__(self, service: EngineService, watch: Callable[[], None] = lambda: None) -> None:
        self._service = service
        self._watch = watch
        self._numbers = itertools.count()

    async def ask(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        """See Client. Tokens are timed in the engine's thread; this loop is woken once, at the end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Chunk] = loop.create_future()
        tokens: list[int] = []
        times: list[float] = []
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        name = f"bench-{next(self._numbers)}"
        request = GenerationRequest(name, role, Prompt(tuple(prompt)), params)
        start = time.perf_counter()

        def take(chunk: Chunk) -> None:
            now = time.perf_counter() - start
            tokens.extend(chunk.token_ids)
            times.extend(now for _ in chunk.token_ids)
            self._watch()
            if chunk.finish_reason is not None:
                loop.call_soon_threadsafe(_resolve, ended, chunk)

        self._service.submit(request, take)
        try:
            last = await ended
        except asyncio.CancelledError:
            self._service.cancel(name)
            raise
        if last.finish_reason is not FinishReason.LENGTH:
            raise LRAgentError(last.error or f"the answer ended by {last.finish_reason}")
        usage = last.usage
        assert usage is not None, "an answer's last chunk carries its usage"
        cost = Cost(usage.prompt_tokens, usage.tokens_computed, usage.base_reused, usage.lr_reused)
        return Answer(tuple(tokens), tuple(times), len(tokens), cost)


def _resolve(ended: asyncio.Future[Chunk], chunk: Chunk) -> None:
    if not ended.done():
        ended.set_result(chunk)
