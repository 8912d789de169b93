"""The OpenAPI document: it is one, and nothing that is made by it, right or wrong, breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from api_fakes import live_server
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from real_engine import build_tiny
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.service import EngineService
from lragent.serve.ledger.ledger import Ledger
from lragent.serve.ledger.prices import Prices

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def short(files: tuple[Path, Path]) -> Iterator[EngineService]:
    """Short contexts: many requests ask for as much as there is."""
    built = build_tiny(files, max_model_len=96)
    built.start()
    yield built
    built.stop(drain=False)


@pytest.fixture(scope="module")
def described(short: EngineService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    place = tmp_path_factory.mktemp("described")
    ledger = Ledger(place / "ledger.sqlite", Prices(), ())
    try:
        with live_server(short, ServeSettings(port=0, roles_folder=place, max_n=4), ledger) as url:
            yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    finally:
        ledger.close()


OPERATIONS = [
    ("GET", "/v1/models"), ("GET", "/v1/models/{model}"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"), ("GET", "/v1/usage"), ("GET", "/health"),
    ("GET", "/version"), ("GET", "/metrics"), ("POST", "/tokenize"), ("POST", "/detokenize"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_is_made_by_the_document(described: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Right by the document, and wrong by it. (schemathesis' own plugin for pytest does not know this pytest yet.)"""

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(described[path][method].as_strategy(generation_mode=mode))
    def asked(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=30)

    try:
        asked()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # what takes nothing cannot be asked wrongly


def test_nothing_is_left_behind(short: EngineService, described: Any) -> None:
    used = short.ask(lambda engine: engine.cache.base_pool.used_count - engine.cache.base_tree.size).result(10)
    assert used == 0
    assert short.stats().running == short.stats().waiting == 0


def test_every_path_is_described(described: Any) -> None:
    paths = described.raw_schema["paths"]
    assert {path for _, path in OPERATIONS} == set(paths)
    for operations in paths.values():
        for operation in operations.values():
            assert "200" in operation["responses"]
            assert operation["responses"]["400"]["content"]["application/json"]["schema"]
    chat = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "tools", "response_format", "n", "stream"} <= set(chat["properties"])
    assert chat["required"] == ["model", "messages"]


def test_keys_are_described_where_they_are_asked_for(short: EngineService) -> None:
    settings_ = ServeSettings(port=0, api_key=("a-secret-key",))
    with live_server(short, settings_) as url:
        headers = {"Authorization": "Bearer a-secret-key"}
        document = httpx.get(f"{url}/openapi.json", headers=headers, trust_env=False).json()
    assert document["security"] == [{"key": []}]
