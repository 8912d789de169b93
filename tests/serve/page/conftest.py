"""One browser for all tests of the page, and for each a server of its own with made-up data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from page_server import Scene, serve
from playwright.sync_api import Browser, Page, sync_playwright

EXECUTABLE = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for the whole session: while playwright runs, no later test could run an event loop of its own."""
    if EXECUTABLE is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on the path")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def url(scene: Scene) -> Iterator[str]:
    with serve(scene) as address:
        yield address


class Watch:
    """What a page must never do: complain, fail, or ask another origin."""

    def __init__(self, page: Page, url: str) -> None:
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "request", lambda asked: None if asked.url.startswith((url, "data:")) else self.foreign.append(asked.url)
        )


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """open_page(errors=False, **context) opens the page. At the end it must have behaved, unless `errors`."""
    opened: list[tuple[Page, Watch, bool]] = []

    def open_(*, errors: bool = False, **context: object) -> Page:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(10_000)
        opened.append((page, Watch(page, url), errors))
        page.goto(url)
        return page

    yield open_
    for page, watch, errors in opened:
        page.context.close()
        assert not watch.foreign
        assert errors or not watch.complaints


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """At its first poll."""
    page = open_page()
    page.wait_for_selector("#roles-body tr")
    return page
