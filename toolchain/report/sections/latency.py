"""Latency: the verdict of every comparison in the words of the harness, and where its interval lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolchain.measure.environment import describe_machine
from toolchain.report.figures import BAR, GAP, PLOT, Bar, Figure
from toolchain.report.record import BenchRow, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table


def _draw(report: Report) -> Part:
    rows = report.bench
    machines = tuple(dict.fromkeys(f"Measured on: {describe_machine(row.environment)}." for row in rows))
    table = Table("Latency", ("where", "verdict"), tuple((str(row), row.summary) for row in rows), text=(0, 1))
    brief = (*(f"{row}: {row.summary}" for row in rows), *machines)
    return Part(table.title, table=table, lines=machines, figures=ratios_figure(rows), brief=brief)


def ratios_figure(rows: Sequence[BenchRow]) -> tuple[Figure, ...]:
    """The interval of compressed time over dense time of each comparison, with its point; nothing without any."""
    if not rows:
        return ()
    ends = [end for row in rows for end in (row.ratio.lo, row.ratio.hi)]
    low: float = math.floor(10 * min(*ends, 0.9)) / 10
    high: float = math.ceil(10 * max(*ends, 1.1)) / 10

    def x(ratio: float) -> float:
        return PLOT * (ratio - low) / (high - low)

    step = BAR + 2 * GAP
    bars = tuple(
        Bar(
            index * step + GAP,
            str(row),
            x(row.ratio.lo),
            x(row.ratio.hi),
            f"{row.ratio.point:.3f}",
            mark=x(row.ratio.point),
        )
        for index, row in enumerate(rows)
    )
    ticks = tuple((x(value), f"{value:g}") for value in dict.fromkeys((low, 1.0, high)))
    caption = "The bar is the confidence interval, the line in it the estimate; left of 1 is faster."
    return (Figure("Compressed time over dense time", caption, bars, (), ticks, len(rows) * step + GAP),)


SECTION = Section("latency", _draw)
