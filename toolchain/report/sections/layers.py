"""Where the bytes are: each kind of layer, in the dense file and in those that could ship."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, size


def _draw(report: Report) -> Part:
    rows = report.layers
    paths = list(rows[0].bytes) if rows else []
    kinds: dict[str, dict[str, int]] = {}
    for row in rows:
        sums = kinds.setdefault(re.sub(r"\b\d+\b", "*", row.layer), dict.fromkeys(paths, 0))
        for path in paths:
            sums[path] += row.bytes[path]
    ordered = sorted(kinds.items(), key=lambda item: -item[1][paths[0]])
    body = tuple((kind, *(size(sums[path]) for path in paths)) for kind, sums in ordered)
    table = Table("Where the bytes are", ("layers", *(PurePosixPath(path).stem for path in paths)), body)
    return Part(table.title, table=table, brief=())


SECTION = Section("layers", _draw)
