"""What each file loses against what it weighs, and against the time that it takes: one point for each file and runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from toolchain.report.choice import UNDECIDED, loss_of
from toolchain.report.figures import Axis, Point, Scatter, scatter
from toolchain.report.record import BenchRow, EngineRow, FileRow, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import loss_words

MODELS = ("dense", "compressed")


def _draw(report: Report) -> Part:
    return Part("Quality against size and time", figures=tuple(_figures(report)), brief=())


def _figures(report: Report) -> Iterator[Scatter]:
    rows: list[FileRow | EngineRow] = [*report.artifacts, *(row for row in report.engines if row.ran)]
    lost = {row.path: loss for row in rows if row.bytes is not None and (loss := loss_of(row)) is not None}
    if len(lost) < 2:
        return
    up = Axis(loss_words(report.dense), lambda share: f"{100 * share:g} %")
    sized = [
        Point((row.bytes or 0) / 1e6, lost[row.path], _label(row), MODELS.index(row.model))
        for row in rows
        if row.path in lost
    ]
    yield scatter(sized, (Axis("MB"), up), "Each file by its bytes", MODELS)
    timed = [row for row in report.bench if row.rivals is None and row.verdict not in UNDECIDED and row.path in lost]
    targets = tuple(dict.fromkeys(row.target for row in timed))
    for batch, threads in dict.fromkeys((row.batch, row.threads) for row in timed):
        there = [row for row in timed if (row.batch, row.threads) == (batch, threads)]
        points = [point for row in there for point in _timed(row, lost, targets.index(row.target))]
        title = f"Each file by its time, batch {batch}, {threads} thread{'s' * (threads > 1)}"
        yield scatter(tuple(dict.fromkeys(points)), (Axis("ms"), up), title, targets)


def _timed(row: BenchRow, lost: Mapping[str, float], style: int) -> Iterator[Point]:
    """A file, and beside its fp32 form the dense one that it was timed with."""
    yield Point(row.compressed_ms, lost[row.path], row.precision, style)
    if row.precision == "fp32" and row.baseline in lost:
        yield Point(row.dense_ms, lost[row.baseline], "dense", style)


def _label(row: FileRow | EngineRow) -> str:
    name = "dense" if row.model == "dense" else row.precision
    return f"{row.target if isinstance(row, EngineRow) else 'onnx'} {name}"


SECTION = Section("quality", _draw)
