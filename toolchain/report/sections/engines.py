"""The engines that were built; "2 of 12 fused" is what the engine inspector says of attention, where a GPU is present."""

from __future__ import annotations

from toolchain.report.record import EngineRow, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, size


def _draw(report: Report) -> Part:
    head = ("file", "products", "attention", "built for")
    table = Table("Engines", head, tuple(_cells(row) for row in report.engines), text=(0, 1, 2, 3))
    return Part(table.title, table=table, brief=tuple(f"{row.path}, {size(row.bytes)}" for row in report.engines))


def _cells(row: EngineRow) -> tuple[str, ...]:
    fused, attention = row.fused_attention, row.attention_layers
    return (
        row.path,
        ", ".join(f"{count} {kind}" for kind, count in (row.matmul_dtypes or {}).items()),
        "–" if attention is None else f"{'?' if fused is None else fused} of {attention} fused",
        ", ".join(row.compute_capabilities or ()) or "–",
    )


SECTION = Section("engines", _draw)
