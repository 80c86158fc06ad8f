"""A report that cannot be read is refused in one short line."""

from __future__ import annotations

import json

import pytest
from made_up_reports import a_report

from toolchain.errors import ArtifactError
from toolchain.report.record import Report


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: f"[{text}]", lambda _: "{}", lambda _: ""])
def test_what_is_no_report_is_not_shown_whole(tmp_path, damage):
    text = json.dumps(a_report().to_dict())
    (tmp_path / "report.json").write_text(damage(text))
    with pytest.raises(ArtifactError, match=r"report\.json is not a slimvit\.report/") as caught:
        Report.load(tmp_path)
    assert len(str(caught.value)) < 400


def test_a_report_comes_back(tmp_path):
    report = a_report()
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    assert Report.load(tmp_path) == report
