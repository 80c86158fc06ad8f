"""What each stage left of the model."""

from __future__ import annotations

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, counted, number, operations, size


def _draw(report: Report) -> Part:
    stages = report.stages
    judged, figures = counted(stages)
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
