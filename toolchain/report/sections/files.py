"""The files that could ship, side by side; of one alone the headline says all."""

from __future__ import annotations

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, counted, size


def _draw(report: Report) -> Part:
    rows = report.artifacts
    judged, figures = counted(rows)
    header = ("file", "size", "as gzip", *judged, "refused")
    body = tuple(
        (row.path, size(row.bytes), size(row.download_bytes), *counts, row.refused or "")
        for row, counts in zip(rows, figures, strict=True)
    )
    table = Table("Files", header, body if len(body) > 2 else (), text=(0, len(header) - 1))
    return Part(table.title, table=table, brief=())


SECTION = Section("files", _draw)
