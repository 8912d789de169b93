"""Chat completions through the official client."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from api_fakes import FakeService

HELLO = [{"role": "user", "content": "hi"}]


def test_an_answer_is_the_roles_and_says_so(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="plan", messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "plan"
    assert answer.choices[0].finish_reason == "stop"
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == "plan:user()|hi\n"
    assert message.model_dump()["name"] == "plan"


def test_the_base_has_no_name(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "base", "messages": HELLO}).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "base:user()|hi\n"}


def test_an_answer_may_be_appended_as_it_was_parsed(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="plan", messages=HELLO).choices[0].message
    grown = [*HELLO, first.model_dump(), {"role": "tool", "content": [{"type": "text", "text": "3"}]}]
    assert first.model_dump()["refusal"] is None
    second = client.chat.completions.create(model="action", messages=grown)
    assert second.choices[0].message.content == "action:user()|hi\nassistant(plan)|plan:user()|hi\n\ntool()|3\n"


def test_usage_counts_what_was_not_computed(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(model="plan", messages=HELLO, max_tokens=4).usage.model_dump()
    assert usage["prompt_tokens"] == 10
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == 14
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3  # 5 found, 2 of them run over again for their LR cache
    assert usage["lragent"] == {"tokens_computed": 7, "base_reused": 5, "lr_reused": 3, "lr_prefilled": 2}


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_answer_is_limited(client: openai.OpenAI, field: str) -> None:
    answer = client.chat.completions.create(model="plan", messages=HELLO, **{field: 3})
    assert answer.choices[0].message.content == "pla"
    assert answer.choices[0].finish_reason == "length"


def test_without_a_limit_the_context_is_it(client: openai.OpenAI, service: FakeService) -> None:
    client.chat.completions.create(model="plan", messages=HELLO)
    assert service.requests[-1].params.max_tokens == service.max_model_len - 10


def test_all_sampling_fields_arrive(client: openai.OpenAI, service: FakeService) -> None:
    client.chat.completions.create(
        model="action",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop="END",
        user="someone",
        max_tokens=5,
        n=1,
        logprobs=None,
        presence_penalty=0.25,
        frequency_penalty=-2,
        logit_bias={"5": -100, "17": 2.5},
        extra_body={
            "top_k": -1,
            "min_p": 0.1,
            "ignore_eos": True,
            "cache_salt": "tenant",
            "trajectory_id": "t1",
            "repetition_penalty": 1.1,
            "never_heard_of": [1, 2],
        },
    )
    request = service.requests[-1]
    assert request.role == "action"
    assert request.salt == "tenant"
    assert request.prompt.opening == 2
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert (params.seed, params.stop, params.ignore_eos, params.max_tokens) == (7, ("END",), True, 5)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.25, -2, 1.1)
    assert (params.logit_bias, params.logprobs) == (((5, -100), (17, 2.5)), None)


def test_null_is_the_same_as_nothing(http: httpx.Client, service: FakeService) -> None:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "stream_options", "n")
    more = ("ignore_eos", "cache_salt", "user", "logprobs", "tools", "response_format", "logit_bias", "chat_template")
    penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty", "top_logprobs", "return_token_ids")
    body = {"model": "plan", "messages": HELLO} | dict.fromkeys((*names, *more, *penalties))
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    params = service.requests[-1].params
    assert (params.temperature, params.stop, service.requests[-1].salt) == (1.0, (), "")


def test_a_stream_gives_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="plan", messages=HELLO, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    first = chunks[0].choices[0].delta.model_dump(exclude_none=True)
    assert first == {"role": "assistant", "name": "plan", "content": ""}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "plan:user()|hi\n"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]


def test_a_stream_ends_with_usage_only_if_asked(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="plan", messages=HELLO, stream=True, stream_options=options)
    assert last.choices == []
    assert last.usage.total_tokens == 25
    assert last.usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_a_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"model": "plan", "messages": [{"role": "user", "content": "a\u2028é\n"}], "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(each.startswith("data: ") and "\n" not in each and each.isascii() for each in events[:-1])
    deltas = [json.loads(each.removeprefix("data: "))["choices"][0]["delta"] for each in events[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == "plan:user()|a\u2028é\n\n"
