"""Log-probabilities and token ids in answers, through the official client: whole and streamed alike."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from api_fakes import BOS, FIRST_BYTE

HELLO = [{"role": "user", "content": "é"}]
RENDERED = "user()|é\n"
IDS = {"return_token_ids": True}


def ids_of(text: str) -> list[int]:
    return [byte + FIRST_BYTE for byte in text.encode()]


@pytest.mark.parametrize("count", [None, 0, 2])
def test_a_chats_logprobs(client: openai.OpenAI, count: int | None) -> None:
    """One entry a token; the two bytes of é are two tokens, each half a character."""
    answer = client.chat.completions.create(model="plan", messages=HELLO, logprobs=True, top_logprobs=count)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.refusal is None
    content = logprobs.content
    assert content is not None
    assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == f"plan:{RENDERED}"
    assert [entry.token for entry in content][:6] == list("plan:u")
    assert [entry.token for entry in content if entry.bytes in ([0xC3], [0xA9])] == ["\ufffd", "\ufffd"]
    assert {entry.logprob for entry in content} == {-0.5}
    assert {len(entry.top_logprobs) for entry in content} == {count or 0}
    if count:
        first, second = content[0].top_logprobs
        assert (first.token, first.logprob, first.bytes) == ("p", -0.5, [ord("p")])
        assert (second.token, second.logprob, second.bytes) == ("q", -1.5, [ord("q")])


def test_what_is_impossible_has_a_number(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="plan", messages=HELLO, logprobs=True, top_logprobs=20, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [each.logprob for each in logprobs.content[0].top_logprobs][-1] == -9999.0


def test_none_unless_asked(client: openai.OpenAI) -> None:
    for asked in ({}, {"logprobs": False}, {"logprobs": None}):
        chat: Any = client.chat.completions.create(model="plan", messages=HELLO, **asked)
        text: Any = client.completions.create(model="plan", prompt="é", extra_body=asked)
        for answer in (chat, text):
            assert answer.choices[0].logprobs is None
            assert "token_ids" not in answer.choices[0].model_extra
            assert "prompt_token_ids" not in {**answer.model_extra, **answer.choices[0].model_extra}


def test_a_chats_stream_says_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "plan", "messages": HELLO, "logprobs": True, "top_logprobs": 1}
    whole: Any = client.chat.completions.create(**options, extra_body=IDS)
    first, *chunks = client.chat.completions.create(**options, stream=True, extra_body=IDS)
    assert whole.prompt_token_ids == first.prompt_token_ids == ids_of(RENDERED)
    assert whole.choices[0].token_ids == ids_of(f"plan:{RENDERED}")
    assert [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", [])] == whole.choices[0].token_ids
    told = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert told == whole.choices[0].logprobs.content
    assert first.choices[0].logprobs is None
    assert not any("prompt_token_ids" in (chunk.model_extra or {}) for chunk in chunks)


def test_a_completions_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="plan", prompt="é", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [*"plan:", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.token_logprobs == [-0.5] * 7
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5, 5]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"p": -0.5}


@pytest.mark.parametrize(("count", "alternatives"), [(0, {"p": -0.5}), (2, {"p": -0.5, "q": -1.5})])
def test_the_token_drawn_is_among_a_completions_alternatives(
    client: openai.OpenAI, count: int, alternatives: dict[str, float]
) -> None:
    logprobs = client.completions.create(model="plan", prompt="é", logprobs=count).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == alternatives


def test_a_completions_stream_says_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "plan", "prompt": ["é", "two"], "logprobs": 1, "extra_body": IDS}
    whole: Any = client.completions.create(**options)
    told: list[dict[str, list[Any]]] = [{}, {}]
    for chunk in client.completions.create(**options, stream=True):
        choice: Any = chunk.choices[0]
        more = choice.logprobs.model_dump() | {"token_ids": choice.token_ids}
        if "prompt_token_ids" in choice.model_extra:
            assert not told[choice.index], "the prompt's ids come with the first chunk"
            more["prompt_token_ids"] = choice.prompt_token_ids
        for name, values in more.items():
            told[choice.index].setdefault(name, []).extend(values)
    for choice, text in zip(whole.choices, ("é", "two"), strict=True):
        assert choice.prompt_token_ids == [BOS, *ids_of(text)]
        assert choice.token_ids == ids_of(f"plan:{text}")
        expected = choice.logprobs.model_dump()
        expected |= {"token_ids": choice.token_ids, "prompt_token_ids": choice.prompt_token_ids}
        assert told[choice.index] == expected
