"""The Pareto front of other budgets as a table, for a plan and for a report."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.compress.outcome import FrontPoint
from toolchain.report.tables import Table, percent

TITLE = "What other budgets would do"
SHOWN = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of the parameters with a row in the table, if the front reaches them."""


def front_table(points: Sequence[FrontPoint]) -> Table:
    """One row for each of `SHOWN` that the front reaches: shares left of everything that costs, and damage."""
    header = ("parameters left", "MACs left", "damage (nats per image)")
    rows = []
    for share in SHOWN:
        if points and points[0].ratio["params"] <= share <= points[-1].ratio["params"]:
            near = min(points, key=lambda point: abs(point.ratio["params"] - share))
            rows.append((percent(near.ratio["params"]), percent(near.ratio["macs"]), f"{near.damage:.2g}"))
    return Table(TITLE, header, tuple(dict.fromkeys(rows)), text=())
