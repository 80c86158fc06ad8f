"""A report as people open it, in a real headless Chromium: at a desk and on a phone, light and dark, every part is there to be seen.

With SLIMVIT_SCREENSHOTS=docs and SLIMVIT_DEMO_RUNS=runs the pictures of the demo's report in docs/ are drawn anew.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from made_up_reports import a_report, timed
from PIL import Image
from web.chromium import opened

from toolchain.report.page import to_html
from toolchain.report.sections import parts

SIZES = {"desk": (1100, 900), "phone": (390, 844)}
RUNS, SCREENSHOTS = os.environ.get("SLIMVIT_DEMO_RUNS", ""), os.environ.get("SLIMVIT_SCREENSHOTS", "")
COVERED = """() => [...document.querySelectorAll("h2, h3, table, svg")].filter((each) => {
  const box = each.getBoundingClientRect();
  return box.width < 1 || box.height < 1;
}).map((each) => each.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def report():
    bench = (
        timed("fp32", 0.66),
        timed("int8-dynamic", 0.35, target="openvino-cpu"),
        timed("fp32", 0.9, "inconclusive", "pi"),
    )
    return a_report().model_copy(update={"bench": bench})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_part_is_seen_and_none_is_wider_than_the_page(browser, report, tmp_path, size, scheme):
    (tmp_path / "index.html").write_text(to_html(report), encoding="utf-8")
    (tmp_path / "favicon.ico").touch()  # which a browser asks every server for
    complaints = []
    with opened(browser, tmp_path) as (page, elsewhere):
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{page.url}index.html")
        assert page.locator("h2").all_inner_texts() == [part.title for part in parts(report) if not part.is_empty]
        assert page.evaluate(COVERED) == []
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        back, front = (
            page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        )
        assert (sum(_rgb(back)) > sum(_rgb(front))) == (scheme == "light")
    assert complaints == elsewhere == []


def _rgb(colour):
    return [float(each) for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.skipif(not RUNS, reason="SLIMVIT_DEMO_RUNS is not set: no demo run to look at")
@pytest.mark.parametrize("size", SIZES)
def test_the_demos_report_is_a_picture(browser, tmp_path, size):
    shutil.copy(Path(RUNS) / "digits_vit" / "report.html", tmp_path / "index.html")
    with opened(browser, tmp_path) as (page, _):
        page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
        page.emulate_media(color_scheme="light")
        page.goto(f"{page.url}index.html")
        drawn = (Path(SCREENSHOTS) if SCREENSHOTS else tmp_path) / f"report-{size}.png"
        page.screenshot(path=drawn, full_page=True, clip={"x": 0, "y": 0, "width": SIZES[size][0], "height": 1700})
    with Image.open(drawn) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(drawn, optimize=True)
    assert 5_000 < drawn.stat().st_size < 200_000
