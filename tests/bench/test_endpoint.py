"""Endpoints: what is asked, what is read from their streams, and what is said where tokens cannot be known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from lragent.bench.clients import Answer, Cost
from lragent.bench.endpoint import Endpoint
from lragent.bench.playing import Load, play
from lragent.bench.traces import Planned
from lragent.errors import LRAgentError, UserError

MODELS = {"plan": "adapter-1", "action": "adapter-2"}


class Vllm:
    """Streams the tokens asked for, two in the first event, as vLLM does with `return_token_ids`."""

    def __init__(self, details: dict[str, int] | None = None, **replaced: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.details, self.replaced = details, replaced

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        asked = body["max_tokens"]
        pieces: list[list[int]] = [[5, 5], *([5] for _ in range(asked - 2))]
        events: list[dict[str, Any]] = [{"choices": [{"text": "a", "token_ids": piece}]} for piece in pieces]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": asked}
        if self.details is not None:
            usage["prompt_tokens_details"] = self.details  # type: ignore[assignment]
        events.append({"choices": [], "usage": usage})
        events = self.replaced.get("events", events)
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return httpx.Response(self.replaced.get("status", 200), text=self.replaced.get("text", text))


def ask(server: Vllm, prompt: Sequence[int] = (1, 2, 3), answer: int = 4, tokenizer: Any = None) -> Answer:
    async def go() -> Answer:
        async with Endpoint("http://server/v1/", MODELS, tokenizer, httpx.MockTransport(server)) as client:
            return await client.ask("action", prompt, answer)

    return asyncio.run(go())


def test_what_is_asked_and_what_comes() -> None:
    server = Vllm({"cached_tokens": 2})
    answer = ask(server)
    assert (answer.token_ids, answer.generated, answer.cost) == ((5, 5, 5, 5), 4, Cost(3, 1, 2))
    assert answer.times[0] == answer.times[1] <= answer.times[2]
    body = server.bodies[0]
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("adapter-2", [1, 2, 3], 4)
    assert body["ignore_eos"] is body["stream"] is body["return_token_ids"] is True
    assert (body["temperature"], body["stream_options"]) == (0, {"include_usage": True})


def test_a_server_need_not_say_what_it_reused() -> None:
    assert ask(Vllm()).cost == Cost(3)


def test_a_trace_goes_on_with_the_servers_tokens() -> None:
    server = Vllm()

    async def go() -> None:
        async with Endpoint("http://server/v1", MODELS, transport=httpx.MockTransport(server)) as client:
            trace = [Planned("plan", 4, 3), Planned("action", 2, 2)]
            assert (await play(client, trace, Load(), vocabulary=100, seed=0)).failures == []

    asyncio.run(go())
    assert server.bodies[1]["prompt"][:7] == [*server.bodies[0]["prompt"], 5, 5, 5]


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (Vllm(status=404, text='{"error": {"message": "no such model"}}'), "HTTP 404: no such model"),
        (Vllm(status=500, text="oops"), "HTTP 500: oops"),
        (Vllm(events=[{"error": {"message": "engine died"}}]), "engine died"),
        (Vllm(events=[]), "without usage"),
    ],
)
def test_failures_are_said(server: Vllm, said: str) -> None:
    with pytest.raises(LRAgentError, match=said):
        ask(server)


class Bytes:
    """A tokenizer with a token for each byte."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


def test_text_alone_needs_a_tokenizer() -> None:
    events = [{"choices": [{"text": "ab"}]}, {"choices": [{"text": "c"}]}]
    server = Vllm(events=[*events, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3}}])
    with pytest.raises(UserError, match="--tokenizer"):
        ask(server)
    answer = ask(server, tokenizer=Bytes())
    assert (answer.token_ids, answer.generated, len(answer.times)) == ((97, 98, 99), 3, 2)
    assert "return_token_ids" not in server.bodies[1]


def test_our_own_counts_are_read() -> None:
    ours = {"tokens_computed": 5, "base_reused": 7, "lr_reused": 6}
    usage = {"prompt_tokens": 12, "completion_tokens": 1, "lragent": ours}
    events = [{"choices": [{"text": "a", "token_ids": [5]}]}, {"choices": [], "usage": usage}]
    assert ask(Vllm(events=events), answer=1).cost == Cost(12, 5, 7, 6)


def test_nobody_there() -> None:
    async def go() -> None:
        async with Endpoint("http://127.0.0.1:9/v1", MODELS) as client:
            await client.ask("plan", [1], 1)

    with pytest.raises(LRAgentError, match=r"127\.0\.0\.1:9"):
        asyncio.run(go())
