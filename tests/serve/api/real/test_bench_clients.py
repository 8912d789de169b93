"""What the benchmark clients of vLLM and SGLang send, byte for byte, and what they read from the answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

VLLM = {"Content-Type": "application/json", "x-request-id": "bench-7", "Authorization": "Bearer none"}
SGLANG = {"Content-Type": "application/json", "Authorization": "Bearer None"}
REQUESTS = {
    # vllm bench serve --backend vllm | openai
    "vllm": (
        "/v1/completions",
        VLLM,
        b'{"model": "plan", "prompt": "The northern harbour", "repetition_penalty": 1.0, "max_tokens": 9, '
        b'"logprobs": null, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true, '
        b'"temperature": 0.0}',
    ),
    # … with a dataset of token ids
    "vllm-ids": (
        "/v1/completions",
        VLLM,
        b'{"model": "plan", "prompt": [5, 6, 7, 8, 9, 10], "repetition_penalty": 1.0, "max_tokens": 9, '
        b'"logprobs": null, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}',
    ),
    # vllm bench serve --backend openai-chat --lora-modules plan …
    "vllm-chat": (
        "/v1/chat/completions",
        VLLM,
        b'{"model": "plan", "messages": [{"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}], '
        b'"max_completion_tokens": 9, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}',
    ),
    # sglang.bench_serving --backend sglang-oai
    "sglang-oai": (
        "/v1/completions",
        SGLANG,
        b'{"model": "plan", "prompt": "The northern harbour", "temperature": 0.0, "best_of": 1, "max_tokens": 9, '
        b'"stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}',
    ),
    # sglang.bench_serving --backend sglang-oai-chat
    "sglang-oai-chat": (
        "/v1/chat/completions",
        SGLANG,
        b'{"model": "plan", "messages": [{"role": "user", "content": "Where is it?"}], "temperature": 0.0, '
        b'"max_tokens": 9, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}',
    ),
    # … --disable-stream
    "sglang-whole": (
        "/v1/chat/completions",
        SGLANG,
        b'{"model": "plan", "messages": [{"role": "user", "content": "Where is it?"}], "temperature": 0.0, '
        b'"max_tokens": 9, "stream": false, "ignore_eos": true}',
    ),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_the_request_and_what_is_read_of_the_answer(http: httpx.Client, name: str) -> None:
    path, headers, body = REQUESTS[name]
    answer = http.post(path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    if not json.loads(body)["stream"]:
        whole = answer.json()
        assert whole["usage"]["completion_tokens"] == 9
        assert isinstance(whole["choices"][0]["message"]["content"], str)
        return
    messages = [message.strip() for message in answer.text.split("\n\n") if message.strip()]
    assert all(message.startswith("data: ") for message in messages)
    assert messages[-1] == "data: [DONE]"
    chunks: list[dict[str, Any]] = [json.loads(message.removeprefix("data: ")) for message in messages[:-1]]
    # vLLM's client takes usage from the chunk without choices alone; SGLang's leaves out every chunk that has usage.
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    assert all(not chunk.get("usage") for chunk in with_choices)
    (last,) = [chunk for chunk in chunks if not chunk["choices"]]
    assert last is chunks[-1]
    assert last["usage"]["completion_tokens"] == 9
    assert last["usage"]["prompt_tokens"] > 0
    for chunk in with_choices:
        choice = chunk["choices"][0]
        text = choice["delta"].get("content") if "chat" in path else choice["text"]
        assert text is None or isinstance(text, str)
    if name.startswith("vllm"):
        assert answer.headers["x-request-id"] == "bench-7"


def test_what_they_ask_before_they_begin(http: httpx.Client) -> None:
    """The model's name, and whether the server is up."""
    assert http.get("/health").status_code == 200
    assert http.get("/v1/models").json()["data"][0]["id"]
    assert http.get("/metrics").status_code == 200
