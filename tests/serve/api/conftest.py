"""A fake service behind a real socket, one for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from api_fakes import FakeService, live_server

from lragent.serve.api.settings import ServeSettings


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def url(service: FakeService) -> Iterator[str]:
    with live_server(service, ServeSettings(port=0, max_body_bytes=100_000)) as address:
        yield address


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    # No keep-alive: after a 500 the server closes the connection, and a reused one would be reset under a later test.
    fresh = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, timeout=10, trust_env=False, limits=fresh) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as official:
        yield official
