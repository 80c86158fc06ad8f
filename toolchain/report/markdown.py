"""report.md."""

from __future__ import annotations

from toolchain.report.claim import claim
from toolchain.report.record import Report
from toolchain.report.sections import Part, parts
from toolchain.report.tables import Table


def to_markdown(report: Report) -> str:
    """The report as Markdown, every number from report.json."""
    drawn = list(parts(report))
    lines = [f"# {inline(title(report))}", "", f"**{inline(claim(report))}**", "", f"{inline(origin(report))}."]
    lines += [f"\n> {inline(caution)}" for part in drawn for caution in part.cautions]
    for part in drawn:
        lines += part_lines(part)
    return "\n".join(lines) + "\n"


def title(report: Report) -> str:
    """Model, method and budget in one line."""
    return f"{report.model.name}: {report.requested_method}, {report.budget.shown or 'no budget'}"


def origin(report: Report) -> str:
    """One line on the version that wrote the report, and on the recipe and data that it is from."""
    return f"Written by {report.tool} from recipe {report.recipe_digest[:12]}; data: {report.data.source}"


def part_lines(part: Part) -> list[str]:
    """The lines of a part below its title, without its drawings; none where it has neither numbers nor sentences."""
    table = ["", *table_lines(part.table)] if part.table and part.table.rows else []
    body = [*table, *(f"\n{inline(line)}" for line in part.lines)]
    return ["", f"## {inline(part.title)}", *body] if body else []


def table_lines(table: Table) -> list[str]:
    """The lines of a Markdown table; columns of numbers are aligned to the right."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(inline(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if column in table.text else "---:" for column in range(len(table.header))) + "|"
    return [line(table.header), rule, *(line(row) for row in table.rows)]


def inline(text: str) -> str:
    """A text that stays within its line and its cell, whatever the names in it hold: no tag, no link and no picture."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("<", "&lt;").replace("](", "]\\(")
