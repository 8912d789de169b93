"""The OpenAI adapter against a server made of canned streams."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from lragent.eval.agent import OutOfContextError
from lragent.eval.openai_client import openai_complete

MESSAGES = [{"role": "user", "content": "?"}, {"role": "assistant", "name": "plan", "content": "Search"}]


def client(handler: Callable[[httpx.Request], httpx.Response]) -> openai.OpenAI:
    transport = httpx.Client(transport=httpx.MockTransport(handler))
    return openai.OpenAI(base_url="http://test/v1", api_key="none", http_client=transport, max_retries=0)


def stream(usage: dict[str, Any] | None) -> httpx.Response:
    """A stream that says `Zenvor` in two pieces, then `usage` in a chunk without choices."""
    common = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "action"}
    deltas = [{"role": "assistant", "content": ""}, {"content": "Zen"}, {"content": "vor"}, {}]
    chunks: list[dict[str, Any]] = [
        common | {"choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}]}
        for delta in deltas
    ]
    if usage is not None:
        chunks.append(common | {"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)


def test_a_turn_is_asked_of_the_role_and_counted() -> None:
    sent: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        usage = {
            "prompt_tokens": 40,
            "completion_tokens": 3,
            "total_tokens": 43,
            "prompt_tokens_details": {"cached_tokens": 30},
            "lragent": {"tokens_computed": 10, "base_reused": 30, "lr_reused": 28},
        }
        return stream(usage)

    reply = openai_complete(client(handler), extra_body={"trajectory_id": "t"})("action", MESSAGES, 16)
    assert reply.text == "Zenvor"
    assert (reply.prompt_tokens, reply.generated_tokens) == (40, 3)
    assert (reply.tokens_computed, reply.tokens_reused, reply.lr_reused) == (10, 30, 28)
    assert reply.ttft_s is not None
    assert reply.total_s is not None
    assert 0 < reply.ttft_s <= reply.total_s
    (body,) = sent
    assert (body["model"], body["messages"], body["max_tokens"], body["temperature"]) == ("action", MESSAGES, 16, 0)
    assert body["stream_options"] == {"include_usage": True}
    assert body["trajectory_id"] == "t"


def test_other_servers_tell_less() -> None:
    usage = {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}
    reply = openai_complete(client(lambda _: stream(usage)))("action", MESSAGES, 16)
    assert (reply.prompt_tokens, reply.tokens_computed, reply.tokens_reused) == (40, None, None)
    reply = openai_complete(client(lambda _: stream(usage | {"prompt_tokens_details": {"cached_tokens": 32}})))(
        "action", MESSAGES, 16
    )
    assert (reply.tokens_computed, reply.tokens_reused, reply.lr_reused) == (8, 32, None)
    reply = openai_complete(client(lambda _: stream(None)))("action", MESSAGES, 16)
    assert (reply.text, reply.prompt_tokens) == ("Zenvor", None)


@pytest.mark.parametrize(
    ("code", "message", "error"),
    [
        ("context_length_exceeded", "no", OutOfContextError),
        (400, "This model's maximum context length is 64 tokens. However, you requested 70.", OutOfContextError),
        (400, "The decoder prompt (length 70) is longer than the Maximum model length of 64.", OutOfContextError),
        ("other", "no", openai.BadRequestError),
        (400, "no", openai.BadRequestError),
    ],
)
def test_only_a_full_context_is_an_ending(code: str | int, message: str, error: type[Exception]) -> None:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": code}}
    with pytest.raises(error):
        openai_complete(client(lambda _: httpx.Response(400, json=body)))("action", MESSAGES, 16)
