"""Bad input: the right status, an OpenAI-shaped body, the field by name; never a 5xx, never another request's end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_fakes import FakeService

HELLO = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _still_serves(http: httpx.Client) -> Iterator[None]:
    """After every bad request a good one is answered."""
    yield
    assert http.post(TEXT, json={"model": "plan", "prompt": "hi"}).status_code == 200


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600
    assert "Traceback" not in error["message"]
    return error


BAD_FIELDS = [
    *((field, value) for field in ("temperature", "top_p", "min_p") for value in (-1, 1e9, "0.5", [], True)),
    *((field, value) for field in ("temperature", "top_p", "min_p") for value in (float("nan"), float("inf"))),
    *(("top_k", value) for value in (-2, 10**9, 1.5, "5", float("nan"), 10**400)),
    *(("seed", value) for value in (2**63, 1.5, "1", float("nan"), True)),
    *(("max_tokens", value) for value in (0, -1, 10**9, 1.5, "5", float("nan"))),
    *(("stop", value) for value in (7, [7], [""], "x" * 300, ["x"] * 17, {"a": 1})),
    *(("stream", value) for value in ("yes", 1)),
    *(("ignore_eos", value) for value in ("yes", 1)),
    *(("cache_salt", value) for value in (7, "x" * 1000)),
    *(("user", value) for value in (7, ["x"])),
    ("trajectory_id", {}),
    ("stream_options", {"include_usage": True}),
    ("stream_options", 7),
    *(("n", value) for value in (0, 17, -1, 10**9, "1", True, float("nan"))),
    *(("logprobs", value) for value in (-1, 21, 1.5, "5", [], float("nan"))),
    *(("top_logprobs", value) for value in (-1, 5, 21, 1.5, "5", True)),
    ("best_of", 2),
    ("suffix", "."),
    *(("logit_bias", value) for value in ([5], 7, {"x": 1}, {"-1": 1}, {"5": "1"}, {"5": True}, {"5": 101})),
    *(("logit_bias", value) for value in ({"5": float("nan")}, {"9" * 5000: 1}, {"5": 1, "05": 1}, {"5": None})),
    ("logit_bias", {str(token): 1 for token in range(301)}),
    *(("tools", [value]) for value in (7, {"type": "web"}, {"type": "function", "function": {"name": "a b"}})),
    *(("tool_choice", value) for value in ("required", "maybe", 7, {"type": "function", "function": {"name": "f"}})),
    *(("response_format", value) for value in (7, {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "regex"})),
    *(("structured_outputs", value) for value in (7, {}, {"regex": "a", "json": {}}, {"choice": []}, {"json": "{"})),
    *((f"{kind}_penalty", v) for kind in ("presence", "frequency") for v in (-2.1, 2.1, float("nan"), "1", True, [])),
    *(("repetition_penalty", value) for value in (0, -1, 2.1, float("inf"), "1", True)),
    *(("return_token_ids", value) for value in ("yes", 1)),
    *(("min_tokens", value) for value in (-1, 10**9, "5", True)),
    *(("stop_token_ids", value) for value in (5, ["5"], [-1], list(range(65)))),
    *(("include_stop_str_in_output", value) for value in ("yes", 1)),
    *(("skip_special_tokens", value) for value in ("yes", 1)),
    ("guided_json", {}),
    ("chat_template", "{{ messages }}"),
    ("chat_template_kwargs", {"a": 1}),
    ("model", None),
    ("model", 7),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=[f"{f}={str(v)[:20]}" for f, v in BAD_FIELDS])
def test_a_bad_field_is_named(http: httpx.Client, path: str, field: str, value: Any) -> None:
    body = {"model": "plan", "messages": HELLO, "prompt": "hi"} | {field: value}
    error = error_of(http.post(path, content=json.dumps(body), headers=JSON), 400)
    assert re.split(r"[\[.]", error["param"])[0] == field
    assert error["message"].startswith(field)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", [0, -1, 10**9, 1.5])
def test_the_field_that_was_sent_is_named(http: httpx.Client, value: Any) -> None:
    body = {"model": "plan", "messages": HELLO, "max_tokens": 5, "max_completion_tokens": value}
    assert error_of(http.post(CHAT, json=body), 400)["param"] == "max_completion_tokens"


@pytest.mark.parametrize(("path", "value"), [(CHAT, 0), (CHAT, 5), (TEXT, True)])
def test_each_endpoint_has_its_own_logprobs(http: httpx.Client, path: str, value: Any) -> None:
    body = {"model": "plan", "messages": HELLO, "prompt": "hi", "logprobs": value}
    assert error_of(http.post(path, json=body), 400)["param"] == "logprobs"


NEUTRAL = {
    "n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0,
    "frequency_penalty": 0, "repetition_penalty": 1.0, "logit_bias": {}, "tools": [], "tool_choice": "auto",
    "response_format": {"type": "text"}, "min_tokens": 0, "stop_token_ids": [], "stop": [], "skip_special_tokens": True,
    "return_token_ids": False,
}  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_changes_nothing_is_taken(http: httpx.Client, path: str) -> None:
    body = {"model": "plan", "messages": HELLO, "prompt": "hi"} | NEUTRAL
    assert http.post(path, json=body).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ([*HELLO, {"role": "wizard", "content": ""}], "messages[1].role"),
    ],
)
def test_bad_messages(http: httpx.Client, messages: Any, param: str) -> None:
    assert error_of(http.post(CHAT, json={"model": "plan", "messages": messages}), 400)["param"] == param


def test_a_chat_that_fills_the_context(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x" * 5000}]
    error = error_of(http.post(CHAT, json={"model": "plan", "messages": messages}), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_missing_fields(http: httpx.Client) -> None:
    assert error_of(http.post(CHAT, json={"model": "plan"}), 400)["param"] == "messages"
    assert error_of(http.post(TEXT, json={"model": "plan"}), 400)["param"] == "prompt"
    assert error_of(http.post(TEXT, json={"prompt": "hi"}), 400)["param"] == "model"


BAD_PROMPTS = [
    None,
    7,
    {},
    [],
    [[]],
    ["a", 7],
    [7, "a"],
    [["a"]],
    [[7], []],
    [1.5],
    [True],
    [[[7]]],
    "x" * 5000,
    ["x"] * 129,
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=[str(each)[:12] for each in BAD_PROMPTS])
def test_bad_prompts(http: httpx.Client, prompt: Any) -> None:
    assert error_of(http.post(TEXT, json={"model": "plan", "prompt": prompt}), 400)["param"] == "prompt"


BAD_BODIES = {
    "empty": b"",
    "broken": b'{"model": "plan", ',
    "two values": b"{} {}",
    "not UTF-8": b'{"model": "pl\xff\xfean"}',
    "UTF-16": '{"model": "plan"}'.encode("utf-16"),
    "half a surrogate pair": b'{"model": "plan", "prompt": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "half a pair in a name": b'{"model": "\\udfff", "prompt": "", "messages": []}',
    "very deep": b'{"model": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep": b'{"model": "plan", "prompt": "", "messages": ' + b"[" * 70 + b"]" * 70 + b"}",
    "a list": b"[]",
    "null": b"null",
    "a long number": b'{"model": "plan", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies(http: httpx.Client, path: str, body: bytes) -> None:
    error_of(http.post(path, content=body, headers=JSON), 400)


def test_nul_and_whole_surrogate_pairs_are_text(http: httpx.Client) -> None:
    body = b'{"model": "plan", "prompt": "a\\u0000\\ud83d\\ude00"}'
    assert http.post(TEXT, content=body, headers=JSON).json()["choices"][0]["text"] == "plan:a\0😀"


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_wrong_content_types(http: httpx.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    error = error_of(http.post(CHAT, content=b'{"model": "plan"}', headers=headers), 400)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [100_001, 300_000, 5_000_000])
def test_giant_bodies(http: httpx.Client, chunked: bool, size: int) -> None:
    """The limit of these tests is 100,000 bytes. Without a length in the header the bytes are counted."""
    body = b'{"model": "plan", "prompt": "' + b"x" * size + b'"}'
    content: Any = iter([body[i : i + 10_000] for i in range(0, len(body), 10_000)]) if chunked else body
    try:
        answer = http.post(TEXT, content=content, headers=JSON)
    except httpx.TransportError:
        assert size > 400_000  # so far beyond that the server hangs up while it is still being sent
    else:
        assert "100000 bytes" in error_of(answer, 413)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1//models", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/..%2f..%2fetc", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/docs", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", TEXT, 405),
        ("POST", "/health", 405),
    ],
)
def test_wrong_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    error_of(answer, status)
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "status"), [("QUEUE", 429), ("DEAD", 503), ("BUG", 500)])
def test_a_refusal_before_the_first_token_has_its_status(
    http: httpx.Client, text: str, status: int, stream: bool
) -> None:
    answer = http.post(TEXT, json={"model": "plan", "prompt": text, "stream": stream})
    error = error_of(answer, status)
    assert ("retry-after" in answer.headers) == (status == 429)
    assert "secret" not in error["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_failure_without_a_stream(http: httpx.Client, path: str) -> None:
    messages = [{"role": "user", "content": "BREAK"}]
    answer = http.post(path, json={"model": "plan", "prompt": "BREAK", "messages": messages})
    assert "out of slots" in error_of(answer, 500)["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("text", "said"), [("BREAK", "out of slots"), ("EXPLODE", "its log says why")])
def test_a_failure_in_a_stream_is_its_last_event(http: httpx.Client, path: str, text: str, said: str) -> None:
    messages = [{"role": "user", "content": text}]
    answer = http.post(path, json={"model": "plan", "prompt": text, "messages": messages, "stream": True})
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    *_, last = [each for each in answer.text.split("\n\n") if each]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert said in error["message"]
    assert error["type"] == "server_error"


def test_the_official_client_sees_a_broken_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="plan", prompt="BREAK", stream=True)
    assert [next(stream).choices[0].text for _ in range(3)] == ["p", "l", "a"]
    with pytest.raises(openai.APIError, match="out of slots"):
        next(stream)


def test_failures_leave_nothing_running(service: FakeService) -> None:
    assert service.running == set()
