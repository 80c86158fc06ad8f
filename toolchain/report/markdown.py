"""report.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.report.tables import Table, closed_form_line, finetune_line, hardware, suggestion_lines, tables


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, every number from report.json."""
    lines = [
        f"# {title(report)}",
        "",
        f"Written by {report['tool']} from recipe `{report['recipe_digest'][:12]}`; data: {report['data']['source']}.",
    ]
    lines += [f"\n> {caution}" for caution in cautions(report)]
    for index, table in enumerate(tables(report)):
        lines += ["", f"## {table.title}", "", *table_lines(table)]
        if index == 0:
            lines += [f"\n{note}" for note in notes(report)]
    if machine := hardware(report):
        lines += ["", f"Measured on: {machine}."]
    return "\n".join(lines) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """Model, method and budget in one line."""
    asked = {**report["budget"], **{f"latency.{name}": value for name, value in report["budget"]["latency"].items()}}
    budget = ", ".join(f"{name} {value}" for name, value in asked.items() if value and name != "latency")
    return f"{report['model']['name']}: {report['requested_method']}, {budget or 'no budget'}"


def cautions(report: Mapping[str, Any]) -> list[str]:
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
    found += [
        f"The latency budget on {row['target']} is missed: {row['requested']:.3f} of the dense model's time was asked for, "
        f"{row['measured']:.3f} was measured for these shapes."
        for row in report.get("latency_budget", ())
        if row.get("met") is False  # reports of old do not say
    ]
    return found


def notes(report: Mapping[str, Any]) -> list[str]:
    """What explains the numbers, to be read after them."""
    found = list(report.get("notes", ()))
    found += [f"Limit of this model: {limit}." for limit in report.get("limits", ())]
    if (reduced := report.get("closed_form")) is not None:  # reports of old say less
        found.append(closed_form_line(reduced, report.get("output", "logits")))
    if (tuned := report.get("finetune")) is not None and "judged_by" in tuned:
        found.append(finetune_line(tuned, report.get("output", "logits")))
    found += [
        f"Latency budget on {row['target']}, batch {row['batch']}, {row['threads']} thread(s): "
        f"{row['requested']:.3f} of the dense model's time was asked for, {row['measured']:.3f} was measured for "
        "these shapes when the widths were chosen."
        for row in report.get("latency_budget", ())
    ]
    found += [f"Not measured, or not all of it: {row['reason']}" for row in report.get("not_measured", ())]
    found += suggestion_lines(report)
    found += [f"{name}: {note}" for name, graph in report["graphs"].items() for note in graph["notes"]]
    return found


def table_lines(table: Table) -> list[str]:
    """The lines of a Markdown table; columns of numbers are aligned to the right."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if column in table.text else "---:" for column in range(len(table.header))) + "|"
    return [line(table.header), rule, *(line(row) for row in table.rows)]
