"""The report as plain tables of text, which Markdown and the terminal draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.bench.environment import describe_machine


@dataclass(frozen=True)
class Table:
    """A titled table; the first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: float | None) -> str:
    """1_234_567 → "1,234,567"; None → "–"."""
    return "–" if value is None else f"{value:,.0f}"


def size(size_bytes: float | None) -> str:
    """Bytes in kB or MB of powers of 1000."""
    if size_bytes is None:
        return "–"
    return f"{size_bytes / 1e6:,.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def counted(row: Mapping[str, Any]) -> str:
    """Accuracy with its counts: "97.2 % (10 wrong of 359)"."""
    if row["accuracy"] is None:
        return "–"
    return f"{100 * row['accuracy']:.2f} % ({row['wrong']} wrong of {row['total']})"


def signed_percent(share: float | None, reason: str | None) -> str:
    """+14.2 %, or why there is no such number."""
    return f"n/a ({reason})" if share is None else f"{100 * share:+.1f} %"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Every table of a report, in reading order; an empty one is left out."""
    found = [headline(report), stage_table(report), shares_table(report), bench_table(report), parity_table(report)]
    return (
        [*(table for table in found if table.rows), engine_table(report)]
        if _engines(report)
        else [t for t in found if t.rows]
    )


def headline(report: Mapping[str, Any]) -> Table:
    """Dense against compressed."""
    dense, small, ratio = report["dense"], report["compressed"], report["ratio"]
    rows = [
        ("parameters", number(dense["params"]), number(small["params"]), f"{ratio['params']:.3f}"),
        ("MACs per image", number(dense["macs"]), number(small["macs"]), f"{ratio['macs']:.3f}"),
        ("ONNX file, fp32", size(dense["bytes"]), size(small["bytes"]), f"{ratio['bytes']:.3f}"),
        (
            "accuracy (relative error increase)",
            counted(dense),
            counted(small),
            signed_percent(report["relative_error_increase"], report["relative_error_increase_reason"]),
        ),
    ]
    rows += [
        (
            f"latency {row['target']}, batch {row['batch']}, {row['threads']} thread{'s' * (row['threads'] > 1)}",
            f"{row['dense_ms']:.3f} ms",
            f"{row['compressed_ms']:.3f} ms",
            f"{row['ratio']['point']:.3f}",
        )
        for row in report["bench"]
    ]
    return Table("Dense against compressed", ("", "dense", "compressed", "left"), tuple(rows))


def stage_table(report: Mapping[str, Any]) -> Table:
    """What each stage left."""
    rows = tuple(
        (
            row["name"],
            number(row["params"]),
            number(row["macs"]),
            size(row["bytes"]),
            counted(row),
            "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
        )
        for row in report["stages"]
    )
    return Table("Stages", ("after", "parameters", "MACs", "bytes", "test accuracy", "seconds"), rows)


def shares_table(report: Mapping[str, Any]) -> Table:
    """Removed share per block and kind of unit; ° marks kinds that are only zeroed, not physically gone."""
    rows = report["pruned_shares"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    zeroed = {row["kind"] for row in rows if not row["physical"]}
    cells = {(row["block"], row["kind"]): row for row in rows}
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    blocks.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])

    def cell(found: Sequence[Mapping[str, Any]]) -> str:
        total = sum(row["total"] for row in found)
        return "–" if not total else f"{100 * sum(row['removed'] for row in found) / total:.1f} %"

    body = [(block, *(cell([cells[block, k]] if (block, k) in cells else []) for k in kinds)) for block in blocks]
    body.append(("all", *(cell([row for row in rows if row["kind"] == k]) for k in kinds)))
    header = ("block", *(f"{kind}{'°' if kind in zeroed else ''}" for kind in kinds))
    return Table(
        "Removed share per block and kind (° zeroed, not physically gone)", header, tuple(body) if rows else ()
    )


def bench_table(report: Mapping[str, Any]) -> Table:
    """The verdicts, in the words of the harness."""
    rows = tuple(
        (f"{row['target']} {row['precision']} b{row['batch']} t{row['threads']}", row["summary"])
        for row in report["bench"]
    )
    return Table("Latency verdicts", ("where", "verdict"), rows)


def parity_table(report: Mapping[str, Any]) -> Table:
    """The ladder, rung by rung."""
    rows = tuple(
        (
            f"{rung['from']} == {rung['to']}",
            rung["verdict"],
            "–" if rung["max_abs"] is None else f"{rung['max_abs']:.1e}",
            rung["reason"] or "",
        )
        for rung in report["parity"]
    )
    return Table("Parity", ("rung", "verdict", "max |Δ|", "reason"), rows)


def _engines(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        file for file in report["files"] if file["path"].startswith("engines/") and file["path"].endswith(".engine")
    ]


def engine_table(report: Mapping[str, Any]) -> Table:
    """The engines that were built."""
    rows = tuple((file["path"], size(file["bytes"]), file["sha256"][:12]) for file in _engines(report))
    return Table("Engines", ("file", "bytes", "sha256"), rows)


def hardware(report: Mapping[str, Any]) -> str:
    """The machine that latency was measured on, in one line; "" if none was."""
    if not report["bench"]:
        return ""
    return describe_machine(report["bench"][0]["environment"])
