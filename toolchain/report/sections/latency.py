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
    return Part(
        table.title, table=table, lines=machines, figures=(*ratios_figure(rows), *calls_figure(rows)), brief=brief
    )


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


def calls_figure(rows: Sequence[BenchRow]) -> tuple[Figure, ...]:
    """How long single calls took on both sides of each comparison, in medians of its baseline; nothing where that is not known."""
    known = [(row, row.calls) for row in rows if row.calls is not None]
    if not known:
        return ()
    ends = [end / base.p50 for _, (base, ours) in known for calls in (base, ours) for end in (calls.p5, calls.p95)]
    high = math.ceil(10 * max(*ends, 1.0)) / 10
    bars = list[Bar]()
    y = float(GAP)
    for row, (base, ours) in known:
        for style, calls in enumerate((base, ours)):
            p5, p25, p50, p75, p95 = (PLOT * each / base.p50 / high for each in calls.model_dump().values())
            label = "" if style else str(row)
            bars.append(Bar(y, label, p5, p95, f"{calls.p50:.3g} ms", style, mark=p50, core=(p25, p75)))
            y += BAR + GAP / 2
        y += GAP
    ticks = tuple((PLOT * value / high, f"{value:g}") for value in dict.fromkeys((0.0, 1.0, high)))
    caption = (
        "The line is the median of all single calls, the bar holds the middle half of them and its pale part nine in ten. 1 is the "
        "baseline's median."
    )
    return (Figure("Single calls", caption, tuple(bars), ("baseline", "file"), ticks, y),)


SECTION = Section("latency", _draw)
