"""Scatter plots of the loss of each file over its size, and over its latency on each runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from toolchain.measure.comparison import UNDECIDED
from toolchain.report.choice import loss_of
from toolchain.report.figures import Axis, Point, Scatter, scatter
from toolchain.report.record import BenchRow, Counts, EngineRow, FileRow, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import call_words, loss_words

TITLE = "Quality against size and time"
MODELS = ("dense", "compressed")


def _draw(report: Report) -> Part:
    rows: list[FileRow | EngineRow] = [*report.artifacts, *(row for row in report.engines if row.ran)]
    lost = _losses({row.path: row for row in rows if row.bytes is not None})
    if len(lost) < 2:
        return Part(TITLE)
    up = Axis(loss_words(report.dense), lambda share: f"{100 * share:g} %")
    sized = [
        Point((row.bytes or 0) / 1e6, lost[row.path], _label(row), MODELS.index(row.model))
        for row in rows
        if row.path in lost
    ]
    by_bytes = scatter(sized, (Axis("MB"), up), "Each file by its bytes", MODELS)
    lost |= _losses({"dense": report.dense, "deploy": report.compressed})  # folders, for a runtime that takes no file
    timed = [row for row in report.bench if row.rivals is None and row.path in lost]
    decided = [row for row in timed if row.verdict not in UNDECIDED]
    return Part(
        TITLE, lines=_left_out(len(timed) - len(decided)), figures=(by_bytes, *_by_time(decided, lost, up)), brief=()
    )


def _losses(rows: Mapping[str, Counts]) -> dict[str, float]:
    """Path → what is lost there, where it is known."""
    return {path: loss for path, row in rows.items() if (loss := loss_of(row)) is not None}


def _left_out(count: int) -> tuple[str, ...]:
    """How many comparisons are not drawn, in a sentence."""
    what = "one comparison, which is" if count == 1 else f"{count} comparisons, which are"
    return (f"The drawings leave out {what} {' or '.join(UNDECIDED)}.",) if count else ()


def _by_time(timed: Sequence[BenchRow], lost: Mapping[str, float], up: Axis) -> Iterator[Scatter]:
    """A drawing for each batch and number of threads."""
    targets = tuple(dict.fromkeys(row.target for row in timed))
    for batch, threads in dict.fromkeys((row.batch, row.threads) for row in timed):
        there = [row for row in timed if (row.batch, row.threads) == (batch, threads)]
        points = [point for row in there for point in _timed(row, lost, targets.index(row.target))]
        title = f"Each file by its time, {call_words(batch, threads)}"
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
