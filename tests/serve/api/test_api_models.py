"""Model cards, what a model name means, and health."""

from __future__ import annotations

import httpx
import openai
import pytest
from api_fakes import FakeService, live_server


def test_the_base_comes_first(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    base, plan, action = listed["data"]
    assert base["id"] == "org/tiny"
    assert base["parent"] is None
    assert base["max_model_len"] == 4000
    assert (plan["id"], plan["parent"], plan["root"]) == ("plan", "org/tiny", "/packs/team#plan")
    assert action["id"] == "action"
    assert all(card["object"] == "model" and card["owned_by"] == "lragent" for card in listed["data"])


@pytest.mark.parametrize(
    ("name", "found"),
    [("plan", "plan"), ("org/tiny:plan", "plan"), ("org/tiny", "org/tiny"), ("base", "org/tiny")],
)
def test_one_card(client: openai.OpenAI, name: str, found: str) -> None:
    assert client.models.retrieve(name).id == found


@pytest.mark.parametrize(
    ("model", "role"),
    [
        ("plan", "plan"),
        ("base", "base"),
        ("org/tiny", "base"),
        ("org/tiny:action", "action"),
        ("base:action", "action"),
    ],
)
def test_what_a_name_means(client: openai.OpenAI, service: FakeService, model: str, role: str) -> None:
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
    assert answer.model == model
    assert service.requests[-1].role == role


@pytest.mark.parametrize(
    "model", ["reflect", "Plan", "", "org/tiny:reflect", "org/tiny:", "org/tiny:base", "plan:plan"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_unknown_role_is_never_the_base(http: httpx.Client, model: str, path: str) -> None:
    body = {"model": model, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
    answer = http.post(path, json=body)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["param"] == "model"
    assert error["code"] == "model_not_found"
    assert "base, plan, action" in error["message"]


def test_an_unknown_card(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="reflect"):
        client.models.retrieve("reflect")


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.head("/health").status_code == 200


def test_a_dead_engine_is_said_everywhere() -> None:
    service = FakeService()
    with live_server(service) as url, httpx.Client(base_url=url, trust_env=False) as http:
        service.failure = "the loop ended: out of memory"
        health = http.get("/health")
        assert health.status_code == 503
        assert "out of memory" in health.json()["error"]["message"]
        chat = http.post("/v1/chat/completions", json={"model": "plan", "messages": [{"role": "user", "content": ""}]})
        assert chat.status_code == 503
        assert http.get("/v1/models").status_code == 200
