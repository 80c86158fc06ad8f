"""The files that could ship, side by side; of one alone the headline says all."""

from __future__ import annotations

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, number, percent, size


def _draw(report: Report) -> Part:
    rows = report.artifacts
    totals = [row.total for row in rows if row.total is not None]
    wrong = f"wrong of {number(max(totals))}" if totals else "wrong"
    header: tuple[str, ...] = ("file", "size", "as gzip", "accuracy", wrong, "refused")
    judged: list[tuple[str, ...]] = [(percent(row.accuracy), number(row.wrong)) for row in rows]
    if any(row.error is not None for row in rows):
        header = ("file", "size", "as gzip", "squared error", "refused")
        judged = [(percent(row.error),) for row in rows]
    body = tuple(
        (row.path, size(row.bytes), size(row.download_bytes), *counts, row.refused or "")
        for row, counts in zip(rows, judged, strict=True)
    )
    table = Table("Files", header, body if len(body) > 2 else (), text=(0, len(header) - 1))
    return Part(table.title, table=table, brief=())


SECTION = Section("files", _draw)
