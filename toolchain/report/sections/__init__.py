"""The parts of a report: one section is one file, from the record to a table, a figure and sentences.

The terminal, Markdown and the page walk `SECTIONS` in order and know no section by name. Another package adds one by an
entry point of the group "slimvit.sections", a program by `SECTIONS.add`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from toolchain.registry import Registry
from toolchain.report.figures import Figure, Scatter
from toolchain.report.record import Report
from toolchain.report.tables import Table


@dataclass(frozen=True)
class Part:
    """The content of a section for one run.

    Attributes:
        title: above the sentences, where they stand without a table.
        cautions: what a reader must know before any number.
        table: its numbers; one without rows is left out.
        lines: sentences that explain them.
        figures: drawings, on the page alone.
        brief: what a terminal prints in place of table and sentences; None for just these.
    """

    title: str
    cautions: tuple[str, ...] = ()
    table: Table | None = None
    lines: tuple[str, ...] = ()
    figures: tuple[Figure | Scatter, ...] = ()
    brief: tuple[str, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show but cautions."""
        return not (self.lines or self.figures or (self.table and self.table.rows))


@dataclass(frozen=True)
class Section:
    """One section: its name, and how it is drawn from the record."""

    name: str
    draw: Callable[[Report], Part]


def _built_in(*names: str) -> dict[str, str | Section]:
    return {name: f"toolchain.report.sections.{name}:SECTION" for name in names}


SECTIONS: Registry[Section] = Registry(
    "report section",
    "slimvit.sections",
    _built_in(
        "headline",
        "notes",
        "suggestion",
        "quality",
        "latency",
        "stages",
        "shares",
        "front",
        "files",
        "layers",
        "graphs",
        "parity",
        "engines",
        "listing",
    ),
)


def parts(report: Report) -> Iterator[Part]:
    """The parts of all sections for a run, in reading order."""
    return (section.draw(report) for section in SECTIONS.values())
