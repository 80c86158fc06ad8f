"""The sentence at the head of a report: every number in it is one of the record."""

from __future__ import annotations

import html
import re

import pytest
from made_up_reports import a_report, timed

from toolchain.report.claim import claim
from toolchain.report.markdown import to_markdown
from toolchain.report.page import to_html
from toolchain.report.record import Interval


def test_it_says_what_is_left_what_is_lost_and_what_is_saved():
    report = a_report().model_copy(update={"bench": (timed("fp32", 0.66),)})
    sentence, (row,) = claim(report), report.bench
    assert f"{100 * report.ratio.params:.2f} % of the dense model's parameters" in sentence
    assert f"{100 * report.compressed.bytes / report.dense.bytes:.2f} % of its bytes" in sentence
    assert (
        f"wrong on {report.compressed.wrong} of 359 test images, and the dense file on {report.dense.wrong}" in sentence
    )
    assert f"{row.ratio.point:.2f} [0.6" in sentence
    assert sentence in to_markdown(report)
    assert sentence in html.unescape(to_html(report))


@pytest.mark.parametrize("verdict", ["inconclusive", "invalid"])
def test_it_claims_no_speed_that_was_not_decided(verdict):
    report = a_report().model_copy(update={"bench": (timed("fp32", 0.5, verdict),)})
    assert f"is not decided ({verdict})" in claim(report)
    assert not re.search(r"of the dense time|×", claim(report))


def test_a_speedup_is_rounded_down_and_an_interval_outward():
    row = timed("fp32", 0.66).model_copy(
        update={"ratio": Interval(point=0.66, lo=0.6439, hi=0.6761), "verified_speedup_at_least": 1.4799}
    )
    sentence = claim(a_report().model_copy(update={"bench": (row,)}))
    assert "0.66 [0.64, 0.68] of the dense time, a verified speedup of at least 1.47×." in sentence


def test_it_claims_nothing_that_is_not_known():
    report = a_report()
    unknown = {"wrong": None, "total": None, "accuracy": None}
    report = report.model_copy(
        update={
            "bench": (),
            "dense": report.dense.model_copy(update=unknown),
            "compressed": report.compressed.model_copy(update=unknown),
        }
    )
    assert claim(report).count(";") == 0
    assert "wrong" not in claim(report)
