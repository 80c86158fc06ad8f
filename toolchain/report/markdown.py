"""report.md."""

from __future__ import annotations

from toolchain.report.claim import claim
from toolchain.report.record import Report
from toolchain.report.sections import parts
from toolchain.report.tables import Table


def to_markdown(report: Report) -> str:
    """The report as Markdown, every number from report.json."""
    drawn = list(parts(report))
    lines = [f"# {title(report)}", "", f"**{claim(report)}**", "", f"{origin(report)}."]
    lines += [f"\n> {caution}" for part in drawn for caution in part.cautions]
    for part in drawn:
        if not part.is_empty:
            lines += ["", f"## {part.title}"]
        if part.table and part.table.rows:
            lines += ["", *table_lines(part.table)]
        lines += [f"\n{line}" for line in part.lines]
    return "\n".join(lines) + "\n"


def title(report: Report) -> str:
    """Model, method and budget in one line."""
    return f"{report.model.name}: {report.requested_method}, {report.budget.shown or 'no budget'}"


def origin(report: Report) -> str:
    """One line on the version that wrote the report, and on the recipe and data that it is from."""
    return f"Written by {report.tool} from recipe {report.recipe_digest[:12]}; data: {report.data.source}"


def table_lines(table: Table) -> list[str]:
    """The lines of a Markdown table; columns of numbers are aligned to the right."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(inline(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if column in table.text else "---:" for column in range(len(table.header))) + "|"
    return [line(table.header), rule, *(line(row) for row in table.rows)]


def inline(text: str) -> str:
    """A text that stays within its line and its cell, whatever the names in it hold."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("<", "&lt;")
