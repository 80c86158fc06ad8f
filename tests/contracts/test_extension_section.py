"""A report section that another package has: one object and one registration, and every form of the report shows it."""

from __future__ import annotations

import sys

import pytest
from made_up_reports import a_report

from toolchain.cli.screen import print_report
from toolchain.registry import Registry
from toolchain.report.markdown import to_markdown
from toolchain.report.page import to_html
from toolchain.report.sections import SECTIONS, Part, Section, Table

PACKAGE = """
from toolchain.report.sections import Part, Section, Table


def draw(report):
    rows = tuple((row.name, f"{row.params / 1e3:.0f} stones") for row in report.stages)
    table = Table("Weight in stones", ("after", "weight"), rows)
    return Part(table.title, cautions=("Stones are rounded.",), table=table, lines=("A stone is a thousand parameters.",))


SECTION = Section("stones", draw)
"""
BUILT_IN = dict(SECTIONS)
SAID = ("Weight in stones", "1194 stones", "A stone is a thousand parameters.", "Stones are rounded.")


def shown(report, tmp_path, capsys):
    print_report(report, tmp_path)
    return {"terminal": capsys.readouterr().out, "Markdown": to_markdown(report), "page": to_html(report)}


def requires(forms, *, there):
    for form, text in forms.items():
        assert all((words in text) is there for words in SAID), form
        assert "Dense against compressed" in text, "beside the others"


@pytest.fixture
def stones(tmp_path, monkeypatch):
    """The module of a distribution that is installed and declares a section."""
    (tmp_path / "stones.py").write_text(PACKAGE)
    information = tmp_path / "stones-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: stones\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[slimvit.sections]\nstones = stones:SECTION\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "stones"
    sys.modules.pop("stones", None)


def test_a_section_of_an_installed_package_is_in_every_form(stones, tmp_path, capsys, monkeypatch):
    fresh: Registry[Section] = Registry("report section", "slimvit.sections", BUILT_IN)
    monkeypatch.setattr("toolchain.report.sections.SECTIONS", fresh)
    assert list(fresh) == [*BUILT_IN, stones], "after slimvit's own"
    requires(shown(a_report(), tmp_path, capsys), there=True)


def test_a_section_that_a_program_adds_is_in_every_form_until_it_is_taken_out(tmp_path, capsys):
    def draw(report):
        rows = tuple((row.name, f"{row.params / 1e3:.0f} stones") for row in report.stages)
        return Part(SAID[0], (SAID[3],), Table(SAID[0], ("after", "weight"), rows), (SAID[2],))

    SECTIONS.add(Section("stones", draw))
    try:
        requires(shown(a_report(), tmp_path, capsys), there=True)
    finally:
        SECTIONS.discard("stones")
    requires(shown(a_report(), tmp_path, capsys), there=False)


def test_a_section_with_nothing_to_say_leaves_no_trace(tmp_path, capsys):
    SECTIONS.add(Section("empty", lambda _: Part("Nothing at all")))
    try:
        assert not any("Nothing at all" in text for text in shown(a_report(), tmp_path, capsys).values())
    finally:
        SECTIONS.discard("empty")
