"""What a gate writes: Markdown, JUnit XML as parsers read it, and the formats of chart services."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from toolchain.gate import CellResult, Check, GateResult
from toolchain.gate.result import Change, Holm, Summary
from toolchain.measure.samples import ArtifactFacts
from toolchain.report.gate import LAYERS, checks_table, gate_markdown, gate_notes, why_table
from toolchain.report.junit import to_junit
from toolchain.report.trackers import to_bencher, to_github_benchmark

FACTS = ArtifactFacts(name="new.onnx", size_bytes=1500, sha256="ab" * 32)
MACHINE = {"cpu": "test", "threads": 1, "affinity": [0], "runtimes": {"onnxruntime": "1"}}
TIMED = {"verdict": "pass", "latency_ms": {"A": 10.0, "B": 8.0}, "environment": MACHINE}


def check(name, status, **facts):
    return Check(**{"name": name, "status": status, "unit": "bytes", "reason": f"because {status}", **facts})


def cell(name, *checks, **facts):
    values = {"target": "ort-cpu", "batch": 1, "threads": 1, "artifact": FACTS, "baseline": None, **facts}
    return CellResult(name=name, checks=checks, **values)


@pytest.fixture
def result():
    latency = {"unit": "ratio", "value": 0.8, "lo": 0.78, "hi": 0.82, "limit": 1.05}
    return GateResult(
        tool="slimvit 1",
        cells=(
            cell(
                "timed",
                check("budget.size", "pass", value=1500, limit=2000),
                check("budget.accuracy", "accepted", value=20, unit="wrong images"),
                check("budget.latency", "inconclusive", unit="ms", value=8.0, lo=7.9, hi=8.1),
                check("relation.latency", "pass", **latency),
                comparisons=(TIMED, TIMED),
            ),
            cell("odd | <name> & more", check("relation.size", "fail", reason='two\nlines \x1b[31m"|" <b>')),
            cell(
                "away",
                check("relation.latency", "skipped", unit="ratio"),
                check("budget.latency", "invalid", unit="ms"),
            ),
        ),
        summary=Summary(cells=2, point=0.8, lo=0.78, hi=0.82),
        holm=Holm(hypotheses=6, alpha=0.025),
    )


def parsed(result):
    return JUnitXml.fromstring(to_junit(result).encode())


def test_junit_has_one_case_a_check_with_its_outcome(result):
    (suite,) = parsed(result)
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (7, 1, 2, 1)
    cases = {(case.classname, case.name): [type(outcome) for outcome in case.result] for case in suite}
    assert cases == {
        ("slimvit.gate.timed", "budget.size"): [],
        ("slimvit.gate.timed", "budget.accuracy"): [],
        ("slimvit.gate.timed", "budget.latency"): [Error],
        ("slimvit.gate.timed", "relation.latency"): [],
        ("slimvit.gate.odd | <name> & more", "relation.size"): [Failure],
        ("slimvit.gate.away", "relation.latency"): [Skipped],
        ("slimvit.gate.away", "budget.latency"): [Error],
    }
    (failure,) = [outcome for case in suite for outcome in case.result if isinstance(outcome, Failure)]
    assert failure.type == "fail"
    assert "�[31m" in failure.message, "what XML cannot hold is replaced"
    assert failure.text == failure.message.replace("&", "&")


def test_junit_totals_are_those_of_the_cases(result):
    """Jenkins, GitLab and GitHub reporters count for themselves; others believe the attributes."""
    root = ET.fromstring(to_junit(result))
    assert root.tag == "testsuites"
    for element in (root, root.find("testsuite")):
        assert int(element.get("tests")) == len(root.findall(".//testcase"))
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(element.get(attribute)) == len(root.findall(f".//{tag}"))
    assert all(case.get("classname") and case.get("name") for case in root.iter("testcase"))
    assert to_junit(result).startswith('<?xml version="1.0" encoding="UTF-8"?>')


def test_a_gate_that_evaluated_nothing_is_red_in_junit_too():
    nothing = GateResult(tool="slimvit 1", cells=(cell("away", check("relation.latency", "skipped", unit="ratio")),))
    assert nothing.verdict == "fail"
    (suite,) = parsed(nothing)
    assert (suite.tests, suite.failures, suite.skipped) == (2, 1, 1)


def test_markdown_says_first_what_failed(result):
    text = gate_markdown(result)
    lines = text.splitlines()
    assert (
        lines[0]
        == "## slimvit gate: fail: 7 checks in 3 cells (1 accepted, 1 fail, 1 inconclusive, 1 invalid, 2 pass, 1 skipped; 1 of 3 cells skipped)"
    )
    rows = [line for line in lines if line.startswith("| ") and "|---" not in line][1:]
    assert len(rows) == 7
    assert rows[0].startswith("| fail | odd \\| <name> & more | relation.size | two lines")
    assert "Geometric mean over 2 cells: 0.800 [0.780, 0.820]" in text
    assert "6 latency checks were judged together" in text
    assert "Skipped, wholly or in part: 1 of 3 cells (away)" in text
    assert text.count("Measured on: test") == 1
    assert "<details>" not in text


def test_every_check_is_in_the_table_and_skips_are_noted(result):
    assert len(checks_table(result).rows) == 7
    assert any("away" in note for note in gate_notes(result))


def changes(count):
    return tuple(Change(layer=f"blocks.{i}", part="weight", before=100, after=100 + 10 * (i + 1)) for i in range(count))


def test_an_attribution_sums_to_the_change_even_if_it_is_cut(result):
    rows = changes(LAYERS + 5)
    gained = sum(row.change for row in rows)
    baseline = FACTS.model_copy(update={"size_bytes": 1500 - gained})
    shown = cell("why", check("budget.size", "pass"), why=rows, baseline=baseline)
    table = why_table(shown)
    assert table.title == f"why: {gained:+,} bytes, {1500 - gained:,} → 1,500"
    assert len(table.rows) == LAYERS + 1
    assert table.rows[0][0] == f"blocks.{LAYERS + 4}"
    assert sum(int(row[3].replace(",", "")) for row in table.rows) == gained
    assert why_table(cell("none", check("budget.size", "pass"))) is None
    alone = why_table(cell("alone", check("budget.size", "pass"), why=rows))
    assert alone.header == ("layer", "bytes")
    text = gate_markdown(result.model_copy(update={"cells": (shown,)}))
    assert "<details><summary>why: " in text


def test_github_action_benchmark(result):
    rows = to_github_benchmark(result)
    assert json.loads(json.dumps(rows)) == rows
    assert all(isinstance(row["name"], str) and isinstance(row["unit"], str) for row in rows)
    assert all(isinstance(row["value"], int | float) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    found = {row["name"]: (row["value"], row["unit"], row.get("range")) for row in rows}
    assert found["timed: size"] == (1500, "bytes", None)
    assert found["timed: wrong images"] == (20, "wrong images", None)
    assert found["timed: latency"] == (8.0, "ms", "7.9 … 8.1")
    assert found["timed: latency ratio"] == (0.8, "ratio", "0.78 … 0.82")
    assert [name for name in found if name.startswith("away")] == ["away: size"], (
        "nothing is made up for what was skipped"
    )


def test_bencher_metric_format(result):
    found = to_bencher(result)
    for measures in found.values():
        for name, metric in measures.items():
            assert " " not in name
            assert {"value"} <= metric.keys() <= {"value", "lower_value", "upper_value"}
    assert found["timed"]["latency"] == pytest.approx({"value": 8e6, "lower_value": 7.9e6, "upper_value": 8.1e6})
    assert found["timed"]["file-size"] == {"value": 1500}
    assert found["away"] == {"file-size": {"value": 1500}}
