"""What a gate writes: Markdown, JUnit XML as parsers read it, and the formats of chart services."""

from __future__ import annotations

import datetime as dt
import json
import math
import xml.etree.ElementTree as ET

import pytest
from builders import few_sessions, write_samples
from junitparser import Error, Failure, JUnitXml, Skipped

from toolchain.gate import Accept, GateConfig, GateResult
from toolchain.gate.evidence import Change, Evidence, Facts, Missing
from toolchain.measure.samples import ArtifactFacts
from toolchain.report.gate import LAYERS, checks_table, gate_markdown, gate_notes, why_table
from toolchain.report.junit import to_junit
from toolchain.report.trackers import to_bencher, to_github_benchmark

DAY = dt.date(2030, 1, 15)
FILE = ArtifactFacts(name="new.onnx", size_bytes=1500, sha256="ab" * 32)
AWAY = Missing(why="unavailable", reason="there is no GPU")
LOST = Missing(why="failed", reason="the device is gone")
ODD = Missing(why="unfit", reason='two\nlines \x1b[31m"|" <b>')


def cell(name, *, budget=None, relation=None, counts=None, attempts=(), baseline=None, **facts):
    """The evidence of a cell; by default against itself, where it asks for a relation."""
    baseline = baseline or (Facts(file=FILE) if relation else None)
    raw = {"name": name, "artifact": "new.onnx", "baseline": "old" if baseline else "", "threads": 1}
    raw |= {"budget": budget or {}, "relation": relation or {}}
    config = {"data": {"source": "digits"}, "baseline": {"old": {"path": "o", "sha256": "0" * 64}}, "cell": [raw]}
    (asked,) = GateConfig.model_validate(config).cell
    artifact = Facts(file=FILE, counts=counts or {}, images=100 if "accuracy" in (counts or {}) else None)
    return Evidence(cell=asked, artifact=artifact, baseline=baseline, attempts=attempts, **facts)


def timed(**truth):
    """A comparison of the file with itself that says whatever is wanted."""
    comparison = write_samples(design=few_sessions(), **truth)
    return comparison.model_copy(update={"artifacts": {"A": FILE, "B": FILE}, "parity": "not claimed"})


def gate(*evidence, accepts=()):
    return GateResult(tool="slimvit 1", day=DAY, accepts=accepts, evidence=evidence)


@pytest.fixture(scope="module")
def result():
    wrong = Accept(
        cell="timed", check="budget.accuracy", at_most=20, reason="known", accepted=DAY, expires=DAY + dt.timedelta(9)
    )
    return gate(
        cell(
            "timed",
            budget={"size": 2000, "accuracy": 0.9, "latency": "8 ms"},
            relation={"latency": 0.05},
            counts={"size": 1500, "accuracy": 20},
            attempts=(timed(b=math.log(0.8), noise=0.01),),
        ),
        cell("odd (name)", budget={"latency": "1 ms"}, attempts=(ODD,)),
        cell("away", relation={"latency": 0.05}, attempts=(AWAY,)),
        cell("lost", relation={"latency": 0.05}, attempts=(LOST,)),
        cell("also", relation={"latency": 0.05}, attempts=(timed(b=math.log(0.8)),)),
        accepts=(wrong,),
    )


def parsed(result):
    return JUnitXml.fromstring(to_junit(result).encode())


def test_junit_has_one_case_a_check_with_its_outcome(result):
    (suite,) = parsed(result)
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (8, 1, 2, 1)
    cases = {(case.classname, case.name): [type(outcome) for outcome in case.result] for case in suite}
    assert cases == {
        ("slimvit.gate.timed", "budget.size"): [],
        ("slimvit.gate.timed", "budget.accuracy"): [],
        ("slimvit.gate.timed", "budget.latency"): [Error],
        ("slimvit.gate.timed", "relation.latency"): [],
        ("slimvit.gate.odd (name)", "budget.latency"): [Failure],
        ("slimvit.gate.away", "relation.latency"): [Skipped],
        ("slimvit.gate.lost", "relation.latency"): [Error],
        ("slimvit.gate.also", "relation.latency"): [],
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
    nothing = gate(cell("away", relation={"latency": 0.05}, attempts=(AWAY,)))
    assert nothing.verdict == "fail"
    (suite,) = parsed(nothing)
    assert (suite.tests, suite.failures, suite.skipped) == (2, 1, 1)


def test_markdown_says_first_what_failed(result):
    text = gate_markdown(result)
    lines = text.splitlines()
    counts = "1 accepted, 1 fail, 1 inconclusive, 1 invalid, 3 pass, 1 skipped; 1 of 5 cells skipped"
    assert lines[0] == f"## slimvit gate: fail: 8 checks in 5 cells ({counts})"
    rows = [line for line in lines if line.startswith("| ") and "|---" not in line][1:]
    assert len(rows) == 8
    assert rows[0].startswith("| fail | odd (name) | budget.latency | It was not measured: two lines")
    assert '"\\|" &lt;b>. Mend the artifact.' in rows[0]
    assert "Geometric mean over 2 cells: 0.800 [" in text
    assert "Skipped, wholly or in part: 1 of 5 cells (away)" in text
    assert "Accept of budget.accuracy in timed up to 20 through 2030-01-24 (known): used." in text
    assert text.count("Measured on: test") == 1
    assert "<details>" not in text


def test_no_name_of_a_layer_or_an_accept_is_markdown():
    """Kind: text of an artifact's author that a bot publishes under its own name."""
    odd = "a\n\n## slimvit gate: pass\n</details>\\|b"
    changes = (Change(layer=odd, part="weight", before=0, after=1500),)
    other = Accept(cell=odd, check="budget.size", at_most=1, reason=odd, accepted=DAY, expires=DAY)
    text = gate_markdown(gate(cell("c", budget={"size": 9}, counts={"size": 1500}, changes=changes), accepts=(other,)))
    assert "| a ## slimvit gate: pass &lt;/details>\\\\\\|b | 1,500 |" in text.splitlines()
    assert [line for line in text.splitlines() if line.startswith(("##", "</"))] == [text.splitlines()[0], "</details>"]
    assert text.count("</details>") == 1


def test_a_note_says_that_many_cells_were_judged_together():
    cells = [cell(f"cell{i}", relation={"latency": 0.05}, attempts=(timed(),)) for i in range(6)]
    assert "6 latency checks were judged together (Holm, one-sided α 2.5 %)." in gate_notes(gate(*cells))
    assert not any("Holm" in note for note in gate_notes(gate(*cells[:5])))


def test_every_check_is_in_the_table_and_skips_are_noted(result):
    assert len(checks_table(result).rows) == 8
    assert any("away" in note for note in gate_notes(result))


def changes(count):
    return tuple(Change(layer=f"blocks.{i}", part="weight", before=10, after=10 + (i + 1)) for i in range(count))


def test_an_attribution_sums_to_the_change_even_if_it_is_cut():
    rows = changes(LAYERS + 5)
    gained = sum(row.change for row in rows)
    before = Facts(file=FILE.model_copy(update={"size_bytes": 1500 - gained}))
    size = {"budget": {"size": 2000}, "counts": {"size": 1500}}
    whole = Change(layer="blocks.0", part="weight", before=0, after=1500)
    shown = gate(
        cell("why", changes=rows, baseline=before, **size),
        cell("none", **size),
        cell("alone", changes=(whole,), **size),
    )
    table, none, alone = (why_table(each) for each in shown.cells)
    assert table.title == f"why: {gained:+,} bytes, {1500 - gained:,} → 1,500"
    assert len(table.rows) == LAYERS + 1
    assert table.rows[0][0] == f"blocks.{LAYERS + 4}"
    assert sum(int(row[3].replace(",", "")) for row in table.rows) == gained
    assert none is None
    assert (alone.header, alone.rows) == (("layer", "bytes"), (("blocks.0", "1,500"),))
    assert "<details><summary>why: " in gate_markdown(shown)


def ranged(check):
    return f"{check.lo:.6g} … {check.hi:.6g}"


def test_github_action_benchmark(result):
    rows = to_github_benchmark(result)
    assert json.loads(json.dumps(rows)) == rows
    assert all(isinstance(row["name"], str) and isinstance(row["unit"], str) for row in rows)
    assert all(isinstance(row["value"], int | float) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    found = {row["name"]: (row["value"], row["unit"], row.get("range")) for row in rows}
    assert found["timed: size"] == (1500, "bytes", None)
    assert found["timed: wrong images"] == (20, "wrong images", None)
    time, ratio = (check for check in result.cells[0].checks if check.name.endswith("latency"))
    assert found["timed: latency"] == (result.cells[0].comparisons[0].latency_ms("B"), "ms", ranged(time))
    assert found["timed: latency ratio"] == (ratio.value, "ratio", ranged(ratio))
    assert found["also: latency"][2] is None, "where no milliseconds are judged they have no interval"
    assert [name for name in found if name.startswith("away")] == ["away: size"], (
        "nothing is made up for what was skipped"
    )


def test_bencher_metric_format(result):
    found = to_bencher(result)
    for measures in found.values():
        for name, metric in measures.items():
            assert " " not in name
            assert {"value"} <= metric.keys() <= {"value", "lower_value", "upper_value"}
    time = next(check for check in result.cells[0].checks if check.name == "budget.latency")
    assert found["timed"]["latency"]["value"] == pytest.approx(8e6, rel=0.01)
    bounds = [found["timed"]["latency"][key] for key in ("lower_value", "upper_value")]
    assert bounds == pytest.approx([time.lo * 1e6, time.hi * 1e6])
    assert found["timed"]["file-size"] == {"value": 1500}
    assert found["away"] == {"file-size": {"value": 1500}}
