"""What other budgets would do: the least damage of widths at each cost, as it was known before one was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolchain.report.figures import Axis, Point, Scatter, scatter
from toolchain.report.record import FrontPoint, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table, percent

LEAST = 1e-7
"""Damage in nats below which nothing is drawn: the dense model's is 0, which has no place on a logarithmic axis."""
SHOWN = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of the parameters that a table tells of, where the front reaches them."""


def _draw(report: Report) -> Part:
    chosen = FrontPoint(
        ratio={"params": report.ratio.params, "macs": report.ratio.macs}, damage=sum(row.nats for row in report.damage)
    )
    table = front_table(report.front)
    explained = (
        "Damage is the sum over layers of how far each width alone moves the output, in nats an image. It is known before anything is "
        "reduced: it ranks choices, and the test images above say what came of the one that was made."
    )
    return Part(
        table.title,
        table=table,
        lines=(explained,) if table.rows else (),
        figures=front_figure(report.front, chosen),
        brief=(),
    )


def front_table(points: Sequence[FrontPoint]) -> Table:
    """One row for each of `SHOWN` that the front reaches: shares left of everything that costs, and damage."""
    header = ("parameters left", "MACs left", "damage (nats per image)")
    rows = []
    for share in SHOWN:
        if points and points[0].ratio["params"] <= share <= points[-1].ratio["params"]:
            near = min(points, key=lambda point: abs(point.ratio["params"] - share))
            rows.append((percent(near.ratio["params"]), percent(near.ratio["macs"]), f"{near.damage:.2g}"))
    return Table("What other budgets would do", header, tuple(dict.fromkeys(rows)), text=())


def front_figure(points: Sequence[FrontPoint], chosen: FrontPoint) -> tuple[Scatter, ...]:
    """The front on a logarithmic axis, with what was chosen; nothing without one."""

    def place(point: FrontPoint, label: str, style: int) -> Point:
        return Point(100 * point.ratio["params"], math.log10(point.damage), label, style)

    drawn = [place(point, "", 0) for point in points if LEAST <= point.damage < math.inf]
    if len(drawn) < 2:
        return ()
    own = [place(chosen, "this run", 1)] if LEAST <= chosen.damage < math.inf else []
    axes = (Axis("parameters left, %"), Axis("damage, nats per image", lambda power: f"{10**power:.2g}"))
    return (scatter([*drawn, *own], axes, "What other budgets would do", ("front", "this run")[: 1 + len(own)], drawn),)


SECTION = Section("front", _draw)
