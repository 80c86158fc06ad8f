"""report.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.report.tables import Table, hardware, tables


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, every number from report.json."""
    lines = [
        f"# {title(report)}",
        "",
        f"Written by {report['tool']} from recipe `{report['recipe_digest'][:12]}`; data: {report['data']['source']}.",
    ]
    lines += [f"\n> {note}" for note in notes(report)]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", *_table(table)]
    if machine := hardware(report):
        lines += ["", f"Measured on: {machine}."]
    return "\n".join(lines) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """Model, method and budget in one line."""
    budget = ", ".join(f"{name} {value}" for name, value in report["budget"].items() if value)
    return f"{report['model']['name']}: {report['requested_method']}, {budget or 'no budget'}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    if report["synthetic"]:
        used = report["method"]
        found.append(
            f"Synthetic images: accuracy is unknown, nothing was trained; neurons by {used['neurons']}, "
            f"allocation {used['allocation']} (recipe method: {report['requested_method']})."
        )
    elif reason := report["relative_error_increase_reason"]:
        found.append(f"There is no relative error increase: {reason}.")
    if (report.get("finetune") or {}).get("kept") == "before":
        found.append("Fine-tuning made validation worse; the model before it was kept.")
    found += [f"{name}: {note}" for name, graph in report["graphs"].items() for note in graph["notes"]]
    return found


def _table(table: Table) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if column in table.text else "---:" for column in range(len(table.header))) + "|"
    return [line(table.header), rule, *(line(row) for row in table.rows)]
