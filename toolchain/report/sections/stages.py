"""What each stage left of the model."""

from __future__ import annotations

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, number, operations, percent, size


def _draw(report: Report) -> Part:
    stages = report.stages
    totals = [row.total for row in stages if row.total is not None]
    judged: tuple[str, ...] = ("accuracy", f"wrong of {number(max(totals))}" if totals else "wrong")
    figures: list[tuple[str, ...]] = [(percent(row.accuracy), number(row.wrong)) for row in stages]
    if any(row.error is not None for row in stages):
        judged, figures = ("squared error",), [(percent(row.error),) for row in stages]
    rows = tuple(
        (
            row.name,
            number(row.params),
            operations(row.macs),
            size(row.bytes),
            *figure,
            "–" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row, figure in zip(stages, figures, strict=True)
    )
    table = Table("Stages", ("after", "parameters", "MACs", "size", *judged, "seconds"), rows)
    return Part(table.title, table=table)


SECTION = Section("stages", _draw)
