"""The page in a real browser without a network: no error, no request, every figure drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysae.report.build import REPORT_FILE

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, where tests in containers run.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser: Any, path: Path) -> tuple[Any, list[str], list[str]]:
    """The loaded page, its errors and what it asked for beside itself."""
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    errors: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on(
        "request",
        lambda r: requests.append(r.url) if not r.url.startswith(("data:", "blob:")) else None,
    )
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    return page, errors, requests


def test_a_search_opens_without_errors_and_without_a_network(browser: Any, search: Path):
    path = search / REPORT_FILE
    page, errors, requests = opened(browser, path)
    plots = "[...document.querySelectorAll('.plotly-graph-div')]"
    page.wait_for_function(f"{plots}.every(d => d.querySelector('.main-svg'))")
    assert errors == []
    assert requests == [path.as_uri()]
    assert page.locator(".plotly-graph-div").count() >= 3
    # A mark, a line or a field of colour in every interactive figure.
    drawn = page.evaluate(
        f"{plots}.map(d => d.querySelectorAll("
        "'.points path, .gl-container canvas, .contourlayer path, .heatmaplayer image').length)"
    )
    assert min(drawn) > 0
    widths = page.evaluate("[...document.images].map(i => i.naturalWidth)")
    assert len(widths) >= 8
    assert min(widths) > 150
    # Nothing sticks out to the right.
    assert page.evaluate("document.documentElement.scrollWidth") <= 1180


def test_a_study_opens_without_errors_and_without_a_network(browser: Any, study: Path):
    path = study / REPORT_FILE
    page, errors, requests = opened(browser, path)
    assert errors == []
    assert requests == [path.as_uri()]
    assert min(page.evaluate("[...document.images].map(i => i.naturalWidth)")) > 150
