"""Answers of a given form, several answers, and what else OpenAI's and vLLM's clients ask for; by the real engine."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
from api_fakes import wait_until
from real_engine import QUESTION

from lragent.serve.engine.service import EngineService

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
COMMON: dict[str, Any] = {"model": "plan", "messages": QUESTION, "max_tokens": 300}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_by_a_schema(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(**COMMON, response_format=FORMAT, temperature=temperature, seed=1)
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"}
    assert answer.choices[0].finish_reason == "stop"


def test_parsed_by_the_official_client(client: openai.OpenAI) -> None:
    from pydantic import BaseModel, Field

    class Step(BaseModel):
        page: int = Field(ge=0, le=9)
        done: bool

    answer = client.chat.completions.parse(**COMMON, response_format=Step, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, Step)


def test_a_stream_by_a_schema(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**COMMON, response_format=FORMAT, stream=True, seed=2))
    assert set(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks))) == {"name", "age"}


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"response_format": {"type": "regex", "pattern": "[ab]{3}-\\d"}}, "[ab]{3}-\\d"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "x" "y"~3'}}, "xyyy"),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, "(yes|no)!"),
        ({"structured_outputs": {"choice": ["up", 'dow"n']}}, 'up|dow"n'),
        ({"structured_outputs": {"json": {"const": [1, 2]}}}, "\\s*\\[\\s*1\\s*,\\s*2\\s*\\]"),
        ({"structured_outputs": {"json": "{\"const\": 7}"}}, "7"),
        ({"structured_outputs": {"grammar": 'start: "q"'}}, "q"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_form(http: httpx.Client, path: str, given: dict[str, Any], pattern: str) -> None:
    body = {"model": "plan", "messages": QUESTION, "prompt": "hi", "max_tokens": 60, "seed": 3} | given
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    said = choice["message"]["content"] if "message" in choice else choice["text"]
    assert re.fullmatch(pattern, said), said


def test_any_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **(COMMON | {"max_tokens": 900}), response_format={"type": "json_object"}, seed=5, logit_bias={}
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/x"}}}},
        {"response_format": {"type": "regex", "pattern": "(a"}},
        {"response_format": {"type": "regex", "pattern": "(?<=a)b"}},
        {"response_format": {"type": "regex", "pattern": "a" * 300_000}},
        {"response_format": {"type": "grammar", "grammar": "start: nothing"}},
        {"structured_outputs": {"regex": "[z-a]"}},
    ],
)
def test_what_cannot_be_is_refused_at_once(http: httpx.Client, given: dict[str, Any]) -> None:
    answer = http.post("/v1/chat/completions", json=COMMON | given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == next(iter(given))
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "pattern",
    [
        "((a{1,1000}){1,1000}){1,1000}",
        "(.*a){30}.*b{500}(x|y|z){0,3000}",
        "[ab]*a[ab]{2000}",
        "(a|aa)+$",
        "((((a*)*)*)*)*b",
    ],
)
def test_pathological_patterns_take_bounded_time(http: httpx.Client, service: EngineService, pattern: str) -> None:
    body = COMMON | {"max_tokens": 16, "response_format": {"type": "regex", "pattern": pattern}}
    answer = http.post("/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code in (200, 400), answer.text
    wait_until(lambda: not service.stats().running)
    assert http.post("/v1/chat/completions", json=COMMON | {"max_tokens": 2}).status_code == 200


def test_deep_and_wide_schemas_take_bounded_time(http: httpx.Client) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(20):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"p{at}": {"enum": list(range(50))} for at in range(2000)}}
    for schema in (deep, wide, {"anyOf": [wide] * 20}):
        body = COMMON | {"max_tokens": 4, "structured_outputs": {"json": schema}}
        assert http.post("/v1/chat/completions", json=body, timeout=30).status_code in (200, 400)


def test_several_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**(COMMON | {"max_tokens": 12}), n=4, temperature=1.0, seed=7)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    again = client.chat.completions.create(**(COMMON | {"max_tokens": 12}), n=4, temperature=1.0, seed=7)
    assert [choice.message.content for choice in again.choices] == texts
    alone = client.chat.completions.create(**(COMMON | {"max_tokens": 12}), temperature=1.0, seed=7)
    assert alone.choices[0].message.content == texts[0]
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens


def test_several_answers_in_one_stream(client: openai.OpenAI) -> None:
    common = COMMON | {"max_tokens": 10, "n": 3, "temperature": 1.0, "seed": 9}
    whole = client.chat.completions.create(**common)
    texts, roles, reasons = [""] * 3, 0, {}
    usage = None
    for chunk in client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += choice.delta.role is not None
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == 3
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_several_answers_to_several_texts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="plan", prompt=["ab", "xyz"], n=2, max_tokens=5, seed=1, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = client.completions.create(model="plan", prompt="xyz", n=2, max_tokens=5, seed=1, temperature=1.0)
    assert [choice.text for choice in answer.choices[2:]] == [choice.text for choice in alone.choices]
    ids = client.completions.create(model="plan", prompt=["ab", "xyz"], max_tokens=1).usage.prompt_tokens
    assert answer.usage.prompt_tokens == ids


def test_a_text_may_come_with_its_prompt(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="plan", prompt="The harbour", max_tokens=5, temperature=0)
    echoed = client.completions.create(model="plan", prompt="The harbour", max_tokens=5, temperature=0, echo=True)
    assert echoed.choices[0].text.endswith("The harbour" + plain.choices[0].text)
    chunks = list(
        client.completions.create(
            model="plan", prompt="The harbour", max_tokens=5, temperature=0, echo=True, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="plan", prompt="a", echo=True, logprobs=1)


def test_vllms_own_fields(http: httpx.Client) -> None:
    body = COMMON | {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    free = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    stop = free["token_ids"][7]
    ended = http.post("/v1/chat/completions", json=body | {"stop_token_ids": [stop]}).json()["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"] == free["token_ids"][: free["token_ids"].index(stop) + 1]
    longer = http.post("/v1/chat/completions", json=body | {"stop_token_ids": [stop], "min_tokens": 15}).json()
    assert longer["usage"]["completion_tokens"] >= 15
    text = free["message"]["content"]
    mark = text[5:8]
    cut = http.post("/v1/chat/completions", json=body | {"stop": mark, "include_stop_str_in_output": True}).json()
    assert cut["choices"][0]["message"]["content"] == text[: text.index(mark) + len(mark)]


def test_tokens_there_and_back(http: httpx.Client) -> None:
    made = http.post("/tokenize", json={"prompt": "The harbour"}).json()
    assert made["count"] == len(made["tokens"])
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json()["prompt"].endswith("The harbour")
    chat = http.post("/tokenize", json={"model": "plan", "messages": QUESTION}).json()
    asked = http.post("/v1/chat/completions", json=COMMON | {"max_tokens": 1}).json()
    assert chat["count"] == asked["usage"]["prompt_tokens"]
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": QUESTION}), ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**12]}), ("/detokenize", {}), ("/tokenize", {"prompt": 7}),
    ):  # fmt: skip
        assert http.post(path, json=body).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "model": "nobody"}).status_code == 404
