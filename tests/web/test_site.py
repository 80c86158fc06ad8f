"""The documentation's site as `make site` builds it, in a real headless Chromium: every page is whole and asks no other host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import urljoin

import pytest
from web.chromium import opened

SITE = os.environ.get("SLIMVIT_SITE", "")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
PAGES = {"index.html", "getting-started.html", "reference/toolchain.html", "benchmarks/results/real/index.html"}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SITE, reason="SLIMVIT_SITE names no site: make site")]


def short_index():
    """The search's index with its first page alone: hundreds of pages would each read all of it, for most of the time."""
    whole = json.loads((Path(SITE) / "search" / "search_index.json").read_text())
    return {**whole, "docs": whole["docs"][:1]}


@pytest.mark.parametrize("size", SIZES)
def test_every_page_fits_and_asks_no_other_host(browser, size):
    width, height = SIZES[size]
    names = sorted(path.relative_to(SITE).as_posix() for path in Path(SITE).rglob("*.html") if path.name != "404.html")
    assert {*names} >= PAGES
    complaints, index = [], short_index()
    with opened(browser, SITE) as (page, elsewhere):
        page.set_viewport_size({"width": width, "height": height})  # before a page is opened, as it is laid out then
        page.route("**/search_index.json", lambda route: route.fulfill(json=index))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("response", lambda got: None if got.ok or got.status == 304 else complaints.append(got.url))
        root = page.url
        for name in names:
            page.goto(urljoin(root, name))
            complaints += [] if page.locator("article h1").count() else [f"{name} has no title"]
            over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            complaints += [f"{name} is {over} px wider than {width}"] if over > 0 else []
    assert complaints == elsewhere == []


def test_the_search_finds_a_key_of_the_recipe(browser):
    with opened(browser, SITE) as (page, _):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.locator(".md-search__input").fill("calibration_images")
        page.locator(".md-search-result__item").first.wait_for()
        assert "recipe.html" in page.locator(".md-search-result__list").inner_html()
