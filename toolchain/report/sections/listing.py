"""Every file of the run with the beginning of its digest; manifest.json has the whole."""

from __future__ import annotations

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table


def _draw(report: Report) -> Part:
    rows = tuple((file.path, f"{file.bytes:,}", file.sha256[:16]) for file in report.files)
    table = Table("Everything that was written", ("file", "bytes", "sha256"), rows, text=(0, 2))
    return Part(table.title, table=table, brief=())


SECTION = Section("listing", _draw)
