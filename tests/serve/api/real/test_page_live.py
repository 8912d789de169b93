"""The page over a real server: what it shows is what was done, and its playground plays a trajectory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_fakes import live_server
from playwright.sync_api import Page, expect, sync_playwright

from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.service import EngineService
from lragent.serve.ledger.ledger import Ledger
from lragent.serve.ledger.prices import Prices

pytestmark = pytest.mark.slow
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def live(service: EngineService, tmp_path: Path) -> Iterator[str]:
    ledger = Ledger(tmp_path / "ledger.sqlite", Prices(), ())
    try:
        with live_server(service, ServeSettings(port=0), ledger) as url:
            yield url
    finally:
        ledger.close()


@pytest.fixture
def page() -> Iterator[Page]:
    if BROWSER is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on the path")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]).new_page()


def test_what_was_done_is_shown_and_the_playground_reuses(live: str, page: Page, service: EngineService) -> None:
    body = {"model": "plan", "messages": [{"role": "user", "content": "Where?"}], "max_tokens": 6, "ignore_eos": True}
    assert httpx.post(f"{live}/v1/chat/completions", json=body, timeout=60, trust_env=False).status_code == 200
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(live)
    rows = page.locator("#roles-body tr")
    expect(rows).to_have_count(4)
    expect(rows.nth(1)).to_contain_text("plan")
    expect(page.locator("#device")).to_have_text("cpu")
    page.fill("#question", "Where is the northern harbour?")
    page.get_by_label("Max tokens per step").fill("8")
    page.click("#run")
    expect(page.locator("#cards > *")).to_have_count(3, timeout=60_000)
    expect(page.locator("#run")).to_be_enabled(timeout=60_000)
    usage = httpx.get(f"{live}/v1/usage?group_by=role", trust_env=False).json()
    assert {group["name"]: group["requests"] for group in usage["groups"]} == {"plan": 2, "action": 1, "reflect": 1}
    by_role = {group["name"]: group for group in usage["groups"]}
    assert by_role["reflect"]["base_reused"] > by_role["reflect"]["tokens_computed"]
    assert str(by_role["reflect"]["tokens_computed"]) in page.locator("#cards > *").nth(2).inner_text()
    assert complaints == []


def test_its_policy_lets_nothing_else_in(live: str) -> None:
    for path in ("/", "/page/main.js", "/page/page.css"):
        answer = httpx.get(f"{live}{path}", trust_env=False)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/nothing.js", "/page/index", "/page/a.exe"):
        assert httpx.get(f"{live}{path}", trust_env=False).status_code == 404
