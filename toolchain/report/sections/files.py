"""The files that could ship, side by side: ONNX files and engines, with what each weighs, loses and takes where it was timed."""

from __future__ import annotations

from toolchain.report.record import EngineRow, FileRow, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, call_words, counted, size


def _draw(report: Report) -> Part:
    rows: list[FileRow | EngineRow] = [*report.artifacts, *report.engines]
    judged, figures = counted(rows)
    places = list(dict.fromkeys((row.batch, row.threads) for row in report.bench))
    header = (
        "file",
        "size",
        "of dense",
        "as gzip",
        "same outputs",
        *judged,
        *(f"ms, {call_words(*place)}" for place in places),
        "refused",
    )
    body = tuple(
        (
            row.path,
            size(row.bytes),
            "–" if row.bytes is None else f"{100 * row.bytes / report.dense.bytes:.1f} %",
            size(row.download_bytes),
            _verdict(row),
            *counts,
            *(_times(row.path, place, report) or "–" for place in places),
            (row.refused or "") if isinstance(row, FileRow) else "",
        )
        for row, counts in zip(rows, figures, strict=True)
    )
    words = (0, 4, *range(5 + len(judged), len(header)))
    table = Table("Files", header, body if len(body) > 2 else (), text=words).without_blanks()
    return Part(table.title, table=table, brief=())


def _verdict(row: FileRow | EngineRow) -> str:
    """Whether a file gives what it was made from gives: a run does not go on with an ONNX file that does not."""
    if isinstance(row, EngineRow):
        return row.verdict.replace("_", " ") + ", interpreted" * row.interpreted
    return "fail" if row.refused else "pass"


def _times(path: str, place: tuple[int, int], report: Report) -> str:
    """Target and milliseconds in one place, or why a target has none; of a baseline those of its first comparison."""
    there = [row for row in report.bench if row.rivals is None and (row.batch, row.threads) == place]
    timed: dict[str, float] = {}
    for row in there:
        if path in (row.baseline, row.path):
            timed.setdefault(row.target, row.compressed_ms if row.path == path else row.dense_ms)
    missing = {row.target: row.short for row in report.not_measured if path in row.files and row.target not in timed}
    said = (
        *(f"{target} {ms:.3f}" for target, ms in timed.items()),
        *(f"{target} not run: {why}" for target, why in missing.items()),
    )
    return ", ".join(said)


SECTION = Section("files", _draw)
