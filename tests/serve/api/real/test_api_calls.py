"""Tool calls by a real engine: forced by a grammar, and sent back without a miss in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from api_fakes import live_server
from tiny import make_adapter_set, tiny_model, tiny_tokenizer
from tool_templates import HERMES, LLAMA

from lragent.models import fingerprint
from lragent.pack import write_pack
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.build import build_service

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {"page": {"$ref": "#/$defs/page"}, "deep": {"type": "boolean"}},
                "required": ["page", "deep"],
                "additionalProperties": False,
                "$defs": {"page": {"enum": ["Zenvor", "Milbek"]}},
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "finish", "parameters": {"type": "object", "additionalProperties": False}},
    },
]
QUESTION: Any = [{"role": "user", "content": "Who founded it?"}]


@pytest.fixture(scope="module", params=[HERMES, LLAMA], ids=["hermes", "llama"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    place = tmp_path_factory.mktemp("calls")
    tiny_model().save_pretrained(place / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(place / "tiny")
    adapters = make_adapter_set(tiny_model(), ("plan", "action"))
    write_pack(place / "team.safetensors", replace(adapters, base_fingerprint=fingerprint(place / "tiny")))
    service = build_service(
        model=str(place / "tiny"), roles=str(place / "team.safetensors"), dtype="float32", device="cpu",
        max_model_len=1024, max_tokens_in_cache=4096,
    )  # fmt: skip
    service.start()
    try:
        with (
            live_server(service, ServeSettings(port=0)) as url,
            openai.OpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0,
                http_client=openai.DefaultHttpxClient(trust_env=False),
            ) as made,
        ):  # fmt: skip
            yield made
    finally:
        service.stop(drain=False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_valid(client: openai.OpenAI, stream: bool, seed: int) -> None:
    asked: Any = {
        "model": "plan", "messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "max_tokens": 400,
        "temperature": 1.0, "seed": seed, "parallel_tool_calls": False,
    }  # fmt: skip
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
    (call,) = calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("search", "finish")
    if call.function.name == "search":
        assert arguments["page"] in ("Zenvor", "Milbek")
        assert isinstance(arguments["deep"], bool)
    else:
        assert arguments == {}


def test_a_named_call_goes_back_without_a_miss(client: openai.OpenAI) -> None:
    """What the model said as a call comes back as `tool_calls`, and is found in the cache to the last token."""
    choice: Any = {"type": "function", "function": {"name": "search"}}
    first = client.chat.completions.create(
        model="plan", messages=QUESTION, tools=TOOLS, tool_choice=choice, max_tokens=400, temperature=1.0, seed=5
    )
    message = first.choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "search"
    tool = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Milbek did."}
    second = client.chat.completions.create(
        model="action", messages=[*QUESTION, message, tool], tools=TOOLS, max_tokens=4, temperature=0
    )
    # All but the answer's last token, which no step has computed, and what came after it.
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 2
