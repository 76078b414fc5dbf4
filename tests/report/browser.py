"""A real browser for tests of pages: headless Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; a test without one is skipped, and says so."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("needs chromium on the path")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield running
        running.close()


@contextmanager
def visits(browser: Any) -> Iterator[Any]:
    """Opens pages, `visit(address, scheme, width)`. A tab knows its `requests`, and its
    `complaints`: what came on the console, and errors.
    """
    contexts = []

    def visit(address: str, scheme: str = "light", width: int = 1200, **options: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        contexts.append(context)
        tab = context.new_page()
        tab.requests, tab.complaints = [], []
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.on("console", lambda message: tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.goto(address)
        if tab.locator("figure script.spec").count():
            tab.wait_for_selector("html[data-charts=drawn]", timeout=30_000)
        return tab

    yield visit
    for context in contexts:
        context.close()
