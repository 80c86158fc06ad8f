"""The Pareto front of other budgets: the least damage of widths at each cost, before one was chosen."""

from __future__ import annotations

import math

from toolchain.plan import BYTES_PER_PARAM
from toolchain.report.figures import Axis, Point, Scatter, scatter
from toolchain.report.front import TITLE, front_table
from toolchain.report.record import Report
from toolchain.report.sections import Part, Section

OWN = "this run"
LEAST = 1e-7
"""Damage in nats below which nothing is drawn: the dense model's is 0, which has no place on a logarithmic axis."""


def _draw(report: Report) -> Part:
    table = front_table(report.front)
    explained = (
        "Damage is the sum over layers of how far each width alone moves the output, in nats an image. It is known before anything is "
        "reduced: it ranks choices, and the test images above say what came of the one that was made. These are the best at each cost of the "
        "first budget."
    )
    lines = (explained,) if table.rows else ()
    return Part(TITLE, table=table, lines=lines, figures=front_figure(report), brief=())


def front_figure(report: Report) -> tuple[Scatter, ...]:
    """The front on a logarithmic axis, with what was chosen, nothing without one; by bytes where the budget speaks of files.

    A file's damage is then that of widths and of rounding together.
    """
    spent = sum(row.nats for row in report.damage)
    files = [row for row in report.size_budget if row.rounding is not None]
    if files:
        axis = Axis("bytes of the file, % of the dense weights in fp32")
        whole = report.stages[0].params * BYTES_PER_PARAM
        drawn = [
            (point.ratio[f"size.{row.precision}"], point.damage + (row.rounding or 0.0), style)
            for style, row in enumerate(files)
            for point in report.front
        ]
        own = [
            (row.predicted / whole, spent + (row.rounding or 0.0), style)
            for style, row in enumerate(files)
            if row.requested is not None
        ]
        legend = tuple(row.precision for row in files)
    else:
        axis, legend = Axis("parameters left, %"), ("front", "this run")
        drawn = [(point.ratio["params"], point.damage, 0) for point in report.front]
        own = [(report.ratio.params, spent, 1)]
    # Below the front nothing was measured, so a run that lies there has no point.
    own = [each for each in own if any(share <= each[0] for share, _, style in drawn if not files or style == each[2])]
    points, marked = (
        [_point(*each, label) for each in some if _shown(each[1])] for some, label in ((drawn, ""), (own, OWN))
    )
    if len(points) < 2:
        return ()
    up = Axis("damage, nats per image", lambda power: f"{10**power:.2g}")
    line = () if files else points
    return (scatter([*points, *marked], (axis, up), TITLE, legend, line),)


def _shown(damage: float) -> bool:
    return LEAST <= damage < math.inf


def _point(share: float, damage: float, style: int, label: str) -> Point:
    return Point(100 * share, math.log10(damage), label, style)


SECTION = Section("front", _draw)
