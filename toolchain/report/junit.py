"""A gate's result as JUnit XML, the form of a test report that every CI system shows."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from toolchain.gate import CellResult, Check, GateResult

# What XML 1.0 cannot hold in any form; a path or an error message may have it.
ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(result: GateResult) -> str:
    """One suite; a case per check: failure for fail, error for what could not be measured, skipped for skipped.

    A gate that evaluated nothing has one more case, which failed.
    """
    cases = [_case(cell, check) for cell, check in result.checks]
    if result.evaluated_nothing:
        nothing = ET.Element("testcase", classname="slimvit.gate", name="something was evaluated")
        ET.SubElement(nothing, "failure", message=result.headline, type="fail").text = result.headline
        cases.append(nothing)
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
    }
    root = ET.Element("testsuites", {"name": "slimvit gate", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": "slimvit gate", **counts})
    suite.extend(cases)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(cell: CellResult, check: Check) -> ET.Element:
    classname = f"slimvit.gate.{_clean(cell.name)}"
    case = ET.Element("testcase", classname=classname, name=check.name)
    kind = {"fail": "failure", "inconclusive": "error", "invalid": "error", "skipped": "skipped"}.get(check.status)
    reason = _clean(check.reason)
    if kind is None:
        ET.SubElement(case, "system-out").text = f"{check.status}: {reason}"
    elif kind == "skipped":
        ET.SubElement(case, kind, message=reason)
    else:
        ET.SubElement(case, kind, message=reason, type=check.status).text = reason
    return case


def _clean(text: str) -> str:
    return ILLEGAL.sub("�", text)
