"""One sentence that sums up a run, with its evidence: the share that is left, the loss, and the time saved."""

from __future__ import annotations

import math

from toolchain.measure.comparison import UNDECIDED
from toolchain.measure.intervals import outward
from toolchain.report.record import BenchRow, Counts, Report
from toolchain.report.several import file_of
from toolchain.report.tables import number, percent


def claim(report: Report) -> str:
    """The sentence; each number in it stands in the tables below."""
    file = file_of(report)
    params, bytes_ = percent(report.ratio.params), percent(file.bytes / report.dense.bytes)
    parts = [
        f"The {file.precision} file has {params} of the dense model's parameters and {bytes_} of its bytes",
        *([quality] if (quality := _quality(report.dense, file.counts)) else []),
        *([_time(row)] if (row := _timed(report, file.precision)) is not None else []),
    ]
    return f"{'; '.join(parts)}."


def _quality(dense: Counts, own: Counts) -> str:
    if own.wrong is not None and dense.wrong is not None:
        return f"it is wrong on {number(own.wrong)} of {number(own.total)} test images, and the dense file on {number(dense.wrong)}"
    if own.features is not None and own.features.error is not None:
        return f"its features are off by {percent(own.features.error)} of the variance of the dense ones"
    if own.error is not None:
        return f"its outputs are off by {percent(own.error)} of the variance of the dense ones"
    return ""


def _timed(report: Report, precision: str) -> BenchRow | None:
    """The first comparison of the file with the dense one."""
    rows = (row for row in report.bench if row.precision == precision and row.rivals is None)
    return next(rows, None)


def _time(row: BenchRow) -> str:
    where = f"on {row.target}, {row.call}"
    if row.verdict in UNDECIDED:
        return f"whether it is faster {where} is not decided ({row.verdict})"
    took = f"a call {where} takes {row.ratio.point:.2f} {outward(row.ratio.lo, row.ratio.hi)} of the dense time"
    least = row.verified_speedup_at_least
    return took if least is None else f"{took}, a verified speedup of at least {math.floor(100 * least) / 100:.2f}×"
