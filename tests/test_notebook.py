"""What a notebook shows of results: tables and the page, from the object itself."""

from __future__ import annotations

import html
import re

from builders import dense_model, random_plan, write_samples
from made_up_reports import a_report

from toolchain.report.page import to_html


def test_a_report_is_its_page_in_a_frame():
    (inner,) = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', a_report()._repr_html_()).groups()
    assert html.unescape(inner) == to_html(a_report())


def test_a_comparison_is_its_verdict_and_two_latencies():
    shown = write_samples(b=-0.5)
    lines = shown._repr_markdown_().splitlines()
    assert shown.headline in lines[0]
    assert [line.count("|") for line in lines[2:]] == [3] * 4


def test_a_plan_has_one_row_for_each_decision():
    plan = random_plan(dense_model("test_vit"))
    rows = plan._repr_markdown_().splitlines()[4:]
    assert len(rows) == len(plan.keeps) + len(plan.low_ranks) > 0
    assert all(row.startswith("| blocks.") for row in rows)
