"""Any OpenAI endpoint as a trace's player: vLLM, or `lragent serve`.

A context must go on with the very tokens that the server generated, else its prefix cache misses and the measurement is
of something else. Streams with `return_token_ids` carry them; where a server knows no such field, a tokenizer must be
given: then the field is not sent, and the ids are those of the answer's text, which may differ.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from lragent.bench.clients import Answer, Cost
from lragent.bench.playing import Load, Played, play
from lragent.bench.traces import Planned
from lragent.errors import LRAgentError, UserError
from lragent.modes import SharingMode

TIMEOUT_S = 600.0
"""Until the next piece of an answer."""


class Endpoint:
    """A client of `base_url`, which ends in /v1. models: the server's model name for each role."""

    def __init__(
        self,
        base_url: str,
        models: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = base_url.rstrip("/") + "/completions"
        self._models = models
        self._tokenizer = tokenizer
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(TIMEOUT_S, connect=10.0)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, transport=transport)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        """See Client. Raises UserError where the answer's token ids cannot be known."""
        body = {
            "model": self._models[role],
            "prompt": list(prompt),
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._tokenizer is None:
            body["return_token_ids"] = True
        content = json.dumps(body).encode()
        pieces = _Pieces(time.perf_counter())
        try:
            headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
            async with self._http.stream("POST", self._url, content=content, headers=headers) as response:
                if response.status_code != 200:
                    raise LRAgentError(f"HTTP {response.status_code}: {_said(await response.aread())}")
                async for line in response.aiter_lines():
                    pieces.take(line)
        except httpx.HTTPError as error:
            raise LRAgentError(f"{self._url}: {type(error).__name__}: {error}") from error
        return self._answer(pieces)

    def _answer(self, pieces: _Pieces) -> Answer:
        if pieces.usage is None or not pieces.times:
            raise LRAgentError("the stream ended without usage or without any token")
        generated = int(pieces.usage["completion_tokens"])
        if pieces.token_ids:
            return Answer(tuple(pieces.token_ids), tuple(pieces.times), generated, _cost(pieces.usage))
        if self._tokenizer is None:
            raise UserError(
                "--base-url: the server's answers carry no token ids, with which the context must go on; use a server "
                "that knows `return_token_ids`, or give its tokenizer with --tokenizer."
            )
        ids = self._tokenizer(pieces.text, add_special_tokens=False)["input_ids"]
        return Answer(tuple(ids), tuple(pieces.times), generated, _cost(pieces.usage))


@dataclass(frozen=True)
class EndpointSystem:
    """An endpoint as the matrix measures it. name: what its rows are called. mode: whose floor it is held against.

    role_names, models: the trace's roles, and the server's model name for each. vocabulary: ids below it are drawn.
    """

    name: str
    base_url: str
    mode: SharingMode
    role_names: tuple[str, ...]
    models: tuple[str, ...]
    vocabulary: int
    tokenizer: PreTrainedTokenizerBase | None = None

    def play(self, trace: Sequence[Planned], load: Load, *, seed: int, progress: Callable[[], None]) -> Played:
        """See lragent.bench.playing.play."""

        async def go() -> Played:
            models = dict(zip(self.role_names, self.models, strict=True))
            async with Endpoint(self.base_url, models, self.tokenizer) as client:
                return await play(client, trace, load, vocabulary=self.vocabulary, seed=seed, progress=progress)

        return asyncio.run(go())

    def begin(self) -> None:
        """Its cache cannot be emptied; every round's tokens are new to it."""

    def memory(self) -> None:
        """It does not say."""

    def counters(self) -> None:
        """It does not say."""

    def close(self) -> None:
        """It runs elsewhere."""


class _Pieces:
    """What a stream has brought. Without token ids there is one time for each event that brought text."""

    def __init__(self, start: float) -> None:
        self._start = start
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.usage: dict[str, Any] | None = None

    def take(self, line: str) -> None:
        """One line of a stream of server-sent events."""
        if not line.startswith("data:") or line == "data: [DONE]":
            return
        now = time.perf_counter() - self._start
        event = json.loads(line.removeprefix("data:"))
        if "error" in event:
            raise LRAgentError(_said(line.removeprefix("data:").encode()))
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or []
            self.token_ids += ids
            self.text += choice.get("text") or ""
            self.times += [now] * (len(ids) or bool(choice.get("text")))


def _cost(usage: Mapping[str, Any]) -> Cost:
    """Ours says all; elsewhere `cached_tokens` may say what was not computed."""
    prompt, ours = int(usage["prompt_tokens"]), usage.get("lragent")
    if ours is not None:
        return Cost(prompt, ours["tokens_computed"], ours["base_reused"], ours["lr_reused"])
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Cost(prompt) if cached is None else Cost(prompt, prompt - cached, cached)


def _said(body: bytes) -> str:
    """The sentence in an error's body."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        return body.decode("utf-8", "replace")[:300]
