"""A client that goes away, with a real socket: its request is cancelled, streaming or not."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from api_fakes import FakeService, wait_until

ENDLESS = [{"role": "user", "content": "ENDLESS"}]


def send(url: str, path: str, body: dict) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    sock.sendall(head.encode() + raw)
    return sock


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_the_engine_is_told(url: str, service: FakeService, path: str, stream: bool, prompts: int) -> None:
    prompt = ["ENDLESS"] * prompts
    sock = send(
        url, path, {"model": "plan", "messages": ENDLESS, "prompt": prompt, "max_tokens": 4000, "stream": stream}
    )
    expected = prompts if path == "/v1/completions" else 1
    wait_until(lambda: len(service.running) == expected)
    if stream:
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    running = set(service.running)
    sock.close()
    wait_until(lambda: not service.running)
    assert running <= service.cancelled


def test_others_go_on(url: str, service: FakeService, http: httpx.Client) -> None:
    body = {"model": "plan", "prompt": "ENDLESS", "max_tokens": 100, "stream": True}
    gone = send(url, "/v1/completions", body)
    wait_until(lambda: service.running)
    with http.stream("POST", "/v1/completions", json=body) as stays:
        gone.close()
        text = "".join(stays.iter_text())
    assert text.endswith("data: [DONE]\n\n")


def test_half_a_request_asks_nothing(url: str, service: FakeService, http: httpx.Client) -> None:
    asked = len(service.requests)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    assert http.get("/health").status_code == 200
    assert len(service.requests) == asked
