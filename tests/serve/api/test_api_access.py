"""API keys, tenants, request ids and the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_fakes import FakeService, live_server

from lragent.errors import UserError
from lragent.serve.api.access import ApiKeys
from lragent.serve.api.logs import configure_logging
from lragent.serve.api.settings import ServeSettings

ALICE, BOB, ADMIN = "alice-secret-1", "bob-secret-22", "admin-secret-3"
BODY = {"model": "plan", "messages": [{"role": "user", "content": "hi"}]}
PATHS = [
    "/v1/models",
    "/v1/models/plan",
    "/metrics",
    "/openapi.json",
    "/v1/usage",
    "/page/state.json",
    "/nowhere",
    "/version",
]


@pytest.fixture(scope="module")
def guarded() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def http(guarded: FakeService) -> Iterator[httpx.Client]:
    settings = ServeSettings(port=0, api_key=(f"alice={ALICE}", BOB), admin_key=ADMIN)
    with live_server(guarded, settings) as url, httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong-secret"), bearer("x"), bearer(f"alice={ALICE}"), {"Authorization": ALICE},
     {"Authorization": f"Basic {ALICE}"}, {"Authorization": "Bearer \xff\xfe"}],
)  # fmt: skip
def test_everything_needs_a_key(http: httpx.Client, path: str, headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    answer = http.get(path, headers=raw)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert ALICE not in answer.text


def test_nothing_is_read_or_asked_without_a_key(http: httpx.Client, guarded: FakeService) -> None:
    before = len(guarded.requests)
    assert http.post("/v1/chat/completions", json=BODY).status_code == 401
    assert len(guarded.requests) == before


def test_health_and_the_empty_page_need_none(http: httpx.Client) -> None:
    for path in ("/health", "/"):
        assert http.get(path).status_code == 200
    assert http.head("/health").status_code == 200


@pytest.mark.parametrize("secret", [ALICE, BOB, ADMIN])
def test_a_key_opens(http: httpx.Client, secret: str) -> None:
    assert http.post("/v1/chat/completions", json=BODY, headers=bearer(secret)).status_code == 200
    assert http.get("/v1/models", headers={"authorization": f"bearer {secret}"}).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/page/state.json"])
def test_only_the_admin_sees_all(http: httpx.Client, path: str) -> None:
    answer = http.get(path, headers=bearer(ALICE))
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "not_allowed"
    assert http.get("/metrics", headers=bearer(ADMIN)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_only_the_admin_changes_roles(http: httpx.Client, path: str) -> None:
    body = {"lora_name": "plan", "lora_path": "x"}
    assert http.post(path, json=body, headers=bearer(BOB)).json()["error"]["code"] == "not_allowed"


def test_the_official_client_with_a_key(http: httpx.Client) -> None:
    def models(key: str) -> list[Any]:
        web = openai.DefaultHttpxClient(trust_env=False)
        base = f"{http.base_url}/v1"
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0, http_client=web) as client:
            return list(client.models.list().data)

    assert models(ALICE)
    with pytest.raises(openai.AuthenticationError):
        models("wrong-secret")


def test_each_key_is_a_tenant_and_salts_divide_it(http: httpx.Client, guarded: FakeService) -> None:
    salts = []
    for secret, salt in ((ALICE, None), (ALICE, None), (BOB, None), (ALICE, "x"), (BOB, "x"), (ADMIN, None)):
        assert http.post("/v1/chat/completions", json=BODY | {"cache_salt": salt}, headers=bearer(secret)).is_success
        salts.append(guarded.requests[-1].salt)
    assert salts[0] == salts[1]
    assert len(set(salts)) == 5


def test_salts_alone_divide_where_keys_are_no_tenants() -> None:
    service = FakeService()
    settings = ServeSettings(port=0, api_key=(ALICE, BOB), tenants="salt")
    with live_server(service, settings) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for secret in (ALICE, BOB):
            client.post("/v1/chat/completions", json=BODY | {"cache_salt": "x"}, headers=bearer(secret))
    assert {request.salt for request in service.requests} == {"x"}


def test_without_an_admin_key_every_key_is_one() -> None:
    with (
        live_server(FakeService(), ServeSettings(port=0, api_key=(ALICE,))) as url,
        httpx.Client(base_url=url, trust_env=False, headers=bearer(ALICE)) as client,
    ):
        assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    "keys", [("short",), ("with a space",), ("ünicode-secret",), (ALICE, ALICE), (f"a={ALICE}", f"a={BOB}")]
)
def test_bad_keys_are_said_at_start(keys: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="api_key"):
        ApiKeys(keys)


def test_a_secret_is_never_shown() -> None:
    keys = ApiKeys((f"alice={ALICE}", BOB), ADMIN)
    found = keys.find(f"Bearer {BOB}")
    assert found is not None
    assert found.name.startswith("key-")
    assert BOB not in repr(vars(keys)) + repr(found) + found.name


def test_a_request_id_comes_back(http: httpx.Client) -> None:
    given = http.get("/health", headers={"X-Request-Id": "my-id.1:2"})
    assert given.headers["x-request-id"] == "my-id.1:2"
    made = [
        http.get("/health", headers=headers).headers["x-request-id"] for headers in ({}, {}, {"X-Request-Id": "a b"})
    ]
    assert len(set(made)) == 3
    refused = http.get("/v1/models")
    assert refused.status_code == 401
    assert refused.headers["x-request-id"]


def test_the_log_has_a_line_a_request(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "lragent.access"):
        http.get("/v1/models", headers=bearer(ALICE) | {"X-Request-Id": "seen"})
        http.get("/v1/models", headers={"X-Request-Id": "unseen"})
        http.get("/health")
    lines = {record.request_id: record for record in caplog.records}  # type: ignore[attr-defined]
    assert (lines["seen"].status, lines["seen"].key) == (200, "alice")  # type: ignore[attr-defined]
    assert (lines["unseen"].status, lines["unseen"].key) == (401, "")  # type: ignore[attr-defined]
    assert len(caplog.records) == 2
    assert ALICE not in caplog.text


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_in_both_forms(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], logging.getLogger("lragent").level
    try:
        configure_logging("info", form)
        facts: dict[str, Any] = {
            "request_id": "id-1",
            "method": "GET",
            "path": "/x\nforged",
            "status": 200,
            "ms": 1.5,
            "key": "",
        }
        logging.getLogger("lragent.access").info("%(method)s %(path)s %(status)s", facts, extra=facts)
        logging.getLogger("lragent.serve").debug("not shown")
    finally:
        root.handlers[:] = before
        logging.getLogger("lragent").setLevel(level)
    said = capsys.readouterr().err
    assert "not shown" not in said
    if form == "json":
        line = json.loads(said)
        assert (line["request_id"], line["status"], line["level"]) == ("id-1", 200, "INFO")
    else:
        assert "[id-1]" in said


def test_a_path_cannot_forge_a_line(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lragent.access"):
        http.get("/v1/models/a%0Aforged", headers=bearer(ALICE))
    assert all("\n" not in record.getMessage() for record in caplog.records)
