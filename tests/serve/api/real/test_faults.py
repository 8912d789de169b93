"""Faults that servers of this kind have had: each gets its status and one sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import live_server, wait_until
from real_engine import QUESTION, build_tiny

from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.service import EngineService

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY = {"model": "plan", "messages": QUESTION, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def held(service: EngineService) -> int:
    """Slots that neither are free nor belong to the cache."""
    return service.ask(lambda engine: engine.cache.base_pool.used_count - engine.cache.base_tree.size).result(10)


@pytest.fixture(autouse=True)
def at_baseline(service: EngineService) -> Iterator[None]:
    """After every fault: nothing runs, nothing waits, no slot is held."""
    yield
    if service.alive:
        wait_until(lambda: not service.stats().running and not service.stats().waiting)
        assert held(service) == 0


def refused(answer: httpx.Response, status: int, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"].count("\n") == 0
    assert len(error["message"]) < 600
    if param is not None:
        assert error["param"] == param


def test_1_roles_one_after_the_other_cold_and_warm(http: httpx.Client) -> None:
    def say(role: str, salt: str) -> str:
        answer = http.post(CHAT, json=BODY | {"model": role, "cache_salt": salt})
        return answer.json()["choices"][0]["message"]["content"]

    roles = ("plan", "action", "base")
    cold = {role: say(role, f"1-{role}") for role in roles}
    assert [say(role, f"1-{role}") for role in roles] == list(cold.values())
    assert len(set(cold.values())) == 3


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "n", 10**9), (TEXT, "n", 10**9), (CHAT, "top_logprobs", 10**9), (TEXT, "logprobs", 10**9),
        (CHAT, "max_tokens", 10**9), (TEXT, "max_tokens", 10**18), (CHAT, "stop", ["x"] * 100_000),
        (CHAT, "stop", "x" * 100_000), (CHAT, "logit_bias", {str(at): 1 for at in range(100_000)}),
        (CHAT, "stop_token_ids", list(range(100_000))), (CHAT, "min_tokens", 10**9),
        (TEXT, "prompt", ["a"] * 100_000), (CHAT, "model", "x" * 100_000), (CHAT, "cache_salt", "x" * 100_000),
        (CHAT, "trajectory_id", "x" * 100_000), (CHAT, "tools", [{}] * 100_000),
    ],
)  # fmt: skip
def test_6_huge_numbers_and_lists(http: httpx.Client, path: str, field: str, value: Any) -> None:
    refused(http.post(path, json=BODY | {"prompt": "a", "logprobs": None} | {field: value}), 400)


def test_6_together_they_are_too_much(http: httpx.Client) -> None:
    refused(http.post(TEXT, json={"model": "plan", "prompt": ["a"] * 100, "n": 2}), 400, "n")


@pytest.mark.parametrize("value", ["NaN", "-1", "1e9", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_7_numbers_that_are_none(http: httpx.Client, field: str, value: str) -> None:
    if value == "-1" and field == "presence_penalty":
        return
    raw = json.dumps(BODY)[:-1] + f', "{field}": {value}}}'
    if field == "temperature":
        raw = raw.replace('"temperature": 0, ', "")
    refused(http.post(CHAT, content=raw, headers={"Content-Type": "application/json"}), 400, field)


def test_7_giant_headers_and_bodies(url: str, http: httpx.Client) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 300_000 + b"\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 4")
    refused(http.post(CHAT, content=b" " * (9 << 20), headers={"Content-Type": "application/json"}), 413)


def test_7_characters_of_every_kind(http: httpx.Client) -> None:
    for text in ("\0", "\ud7ff\ue000", "\U0010ffff", "<|im_end|>", "\r\n\r\ndata: [DONE]\n\n", "‮abc", "a" * 3000):
        body = BODY | {"messages": [{"role": "user", "content": text}]}
        answer = http.post(CHAT, json=body)
        assert answer.status_code in (200, 400), answer.text
        streamed = http.post(CHAT, json=body | {"stream": True})
        if streamed.status_code == 200:
            assert streamed.text.count("data: [DONE]\n\n") == 1


def test_8_templates_are_not_taken_from_requests(http: httpx.Client) -> None:
    for field, value in (("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"a": 1})):
        refused(http.post(CHAT, json=BODY | {field: value}), 400, field)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_10_the_client_goes(url: str, service: EngineService, stream: bool, n: int) -> None:
    body = json.dumps(BODY | {"stream": stream, "n": n, "max_tokens": 900, "cache_salt": f"10-{stream}-{n}"}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    before = service.stats().finished
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(head.encode() + body)
        wait_until(lambda: service.stats().running == n)
    wait_until(lambda: service.stats().finished == before + n)


def test_11_more_than_the_cache_holds(files: tuple[Path, Path]) -> None:
    """Each alone fills half of it: they are preempted, resume, and say what they say alone."""
    built = build_tiny(files, max_model_len=256, max_tokens_in_cache=512)
    built.start()
    try:
        with (
            live_server(built, ServeSettings(port=0)) as url,
            httpx.Client(base_url=url, timeout=120, trust_env=False) as http,
        ):
            body = BODY | {"max_tokens": 150}

            def say(at: int) -> str:
                messages = [{"role": "user", "content": f"{at} {'harbour ' * 8}"}]
                return http.post(CHAT, json=body | {"messages": messages}).json()["choices"][0]["message"]["content"]

            alone = [say(at) for at in range(5)]
            built.ask(lambda engine: engine.cache.clear()).result(10)
            together: dict[int, str] = {}
            threads = [
                threading.Thread(target=lambda at=at: together.__setitem__(at, say(at)))  # type: ignore[misc]
                for at in range(5)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            assert [together[at] for at in range(5)] == alone
            assert built.stats().preempted > 0 or built.stats().waiting == 0
            wait_until(lambda: not built.stats().running)
            assert held(built) == 0
    finally:
        built.stop(drain=False)


def test_12_the_engine_dies(files: tuple[Path, Path]) -> None:
    """Open requests end with an error, at once; health says so; new ones are refused; nothing hangs."""
    built = build_tiny(files)
    built.start()
    with (
        live_server(built, ServeSettings(port=0)) as url,
        httpx.Client(base_url=url, timeout=30, trust_env=False) as http,
    ):
        results: list[httpx.Response] = []
        body = BODY | {"max_tokens": 900}
        threads = [
            threading.Thread(
                target=lambda stream=stream: results.append(http.post(CHAT, json=body | {"stream": stream}))
            )
            for stream in (False, True, True)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: built.stats().running == 3)

        def broken() -> None:
            raise RuntimeError("the device is lost")

        built._engine.step = broken  # type: ignore[method-assign]
        began = time.monotonic()
        for thread in threads:
            thread.join(15)
            assert not thread.is_alive()
        assert time.monotonic() - began < 15
        for answer in results:
            if answer.headers["content-type"].startswith("text/event-stream"):
                assert '"code":"engine_dead"' in answer.text
                assert "[DONE]" not in answer.text
            else:
                refused(answer, 503)
        assert http.get("/health").status_code == 503
        for path, more in ((CHAT, {}), (TEXT, {"prompt": "a"})):
            refused(http.post(path, json=BODY | more), 503)
        assert http.get("/metrics").status_code == 200
        assert http.get("/page/state.json").json()["alive"] is False
    built.stop(drain=False)


def test_13_tenants(http: httpx.Client) -> None:
    def cached(salt: str) -> int:
        messages = [{"role": "user", "content": "A question that only this test asks."}]
        answer = http.post(CHAT, json=BODY | {"messages": messages, "cache_salt": salt})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("13-a") == 0
    assert cached("13-b") == 0
    assert cached("13-a") > 0


def test_the_queue_is_bounded(files: tuple[Path, Path]) -> None:
    built = build_tiny(files, max_waiting=4)
    built.start()
    try:
        with (
            live_server(built, ServeSettings(port=0)) as url,
            httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
        ):
            body = BODY | {"max_tokens": 400}
            results: list[httpx.Response] = []
            threads = [threading.Thread(target=lambda: results.append(http.post(CHAT, json=body))) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            statuses = sorted(answer.status_code for answer in results)
            assert set(statuses) == {200, 429}
            full = next(answer for answer in results if answer.status_code == 429)
            assert full.headers["retry-after"] == "1"
            assert full.json()["error"]["code"] == "queue_full"
            assert http.post(CHAT, json=BODY).status_code == 200
    finally:
        built.stop(drain=False)
