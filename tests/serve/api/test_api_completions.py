"""Text completions through the official client."""

from __future__ import annotations

import openai
import pytest
from api_fakes import BOS, FIRST_BYTE, FakeService

HI = [ord("h") + FIRST_BYTE, ord("i") + FIRST_BYTE]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [BOS, *HI], [[BOS, *HI]]], ids=["text", "texts", "ids", "id lists"])
def test_every_form_of_prompt(client: openai.OpenAI, service: FakeService, prompt: object) -> None:
    answer = client.completions.create(model="plan", prompt=prompt)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "plan:hi"
    assert answer.choices[0].finish_reason == "stop"
    request = service.requests[-1]
    assert request.prompt.ids.tolist() == [BOS, *HI]
    assert request.prompt.speakers is None
    assert request.prompt.opening == 1
    assert request.request_id == answer.id


def test_special_tokens_may_be_left_out(client: openai.OpenAI, service: FakeService) -> None:
    client.completions.create(model="plan", prompt="hi", extra_body={"add_special_tokens": False})
    assert service.requests[-1].prompt.ids.tolist() == HI


def test_sixteen_tokens_unless_told(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt="x" * 50)
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", [["one", "two", "three"], [[60, 61], [62], [63, 64, 65]]])
def test_several_prompts_are_choices(client: openai.OpenAI, prompt: list) -> None:
    answer = client.completions.create(model="plan", prompt=prompt)
    texts = [each if isinstance(each, str) else bytes(t - FIRST_BYTE for t in each).decode() for each in prompt]
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (index, f"plan:{text}") for index, text in enumerate(texts)
    ]
    alone = [client.completions.create(model="plan", prompt=[each]).usage for each in prompt]
    assert answer.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone)
    assert answer.usage.completion_tokens == sum(usage.completion_tokens for usage in alone)


def test_several_prompts_in_one_stream(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    ends = {}
    *chunks, last = client.completions.create(
        model="plan", prompt=["one", "two", "three"], stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == ["plan:one", "plan:two", "plan:three"]
    assert ends == {0: "stop", 1: "stop", 2: "stop"}
    assert last.choices == []
    assert last.usage.prompt_tokens == 4 + 4 + 6


def test_one_bad_prompt_ends_its_whole_request_and_no_other(client: openai.OpenAI, service: FakeService) -> None:
    with pytest.raises(openai.InternalServerError, match="out of slots"):
        client.completions.create(model="plan", prompt=["ENDLESS", "BREAK"], max_tokens=4000)
    assert service.running == set()
    assert client.completions.create(model="plan", prompt="hi").choices[0].text == "plan:hi"
