"""The page of what compressing costs: seconds and memory of each cell, and a figure."""

from __future__ import annotations

from collections.abc import Sequence

from kinds.cost import pass_seconds
from records import Record, Results
from suite import Suite

from pages import plots
from pages.accuracy import recorded
from pages.text import hardware, markdown, percent, whole


def table(records: Sequence[Record]) -> str:
    """Seconds and peak memory of each cell."""
    body = []
    for record in records:
        recipe, seconds, result = record.definition["recipe"], record.seconds, record.result
        images = recipe["data"]["calibration_images"]
        passes, each = pass_seconds(record)
        body.append(
            [
                f"`{recipe['model']['name']}`",
                str(result["blocks"]),
                str(images),
                f"{result['dense']['params'] / 1e6:.1f} M",
                percent(result["params"] / result["dense"]["params"]),
                *(f"{seconds.get(phase, 0.0):.1f}" for phase in ("damage", "closed form")),
                f"{sum(seconds.values()):.1f}",
                str(passes),
                f"{each:.1f}",
                f"{each / result['blocks']:.2f}",
                f"{result['peak_bytes_loaded'] / 2**30:.2f}",
                f"{result['peak_bytes'] / 2**30:.2f}",
            ]
        )
    head = ["Model", "Blocks", "Images", "Params", "Params left", "Damage, s", "Closed form, s", "All, s"]
    each = ["Passes", "A pass, s", "A pass, s per block"]
    return markdown([*head, *each, "Memory before, GiB", "Peak, GiB"], body)


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md and its figure; empty if nothing is recorded."""
    records, gap = recorded(suite, results)
    if not records:
        return {}
    drawing = plots.cost(records)
    machines = sorted({hardware(record.machine) for record in records})
    parts = [gap, f"![{drawing.caption}](cost.svg)", table(records), "Measured on: " + "; ".join(machines) + "."]
    return {"README.md": whole(suite, parts), "cost.svg": drawing.svg()}
