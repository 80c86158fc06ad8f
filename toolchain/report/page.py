"""report.html: one self-contained page, drawn without a script and without a request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolchain.report.markdown import cautions, notes, title
from toolchain.report.tables import block_order, cell_name, hardware, tables

BAR, GAP, LEFT, WIDTH = 14, 8, 210, 720  # user units of the drawings: height of a bar, space, labels, the whole
PLOT = WIDTH - LEFT - 70


@dataclass(frozen=True)
class Bar:
    """A bar from `start` to `end` (0 … PLOT) with its label to the left and its value to the right."""

    y: float
    label: str
    start: float
    end: float
    value: str
    style: int = 0
    mark: float | None = None


@dataclass(frozen=True)
class Drawing:
    """Bars, the styles that they are told apart by, vertical lines at (x, label), and the height of it all."""

    bars: tuple[Bar, ...]
    legend: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]
    height: float


def to_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page, every number from report.json."""
    environment = Environment(loader=PackageLoader("toolchain.report"), autoescape=True, undefined=StrictUndefined)
    first, *rest = tables(report)
    page: str = environment.get_template("page.html.j2").render(
        title=title(report),
        report=report,
        cautions=cautions(report),
        notes=notes(report),
        headline=first,
        tables=rest,
        hardware=hardware(report),
        shares=shares_drawing(report["pruned_shares"]),
        ratios=ratios_drawing(report["bench"]),
        geometry={"bar": BAR, "left": LEFT, "width": WIDTH, "plot": PLOT},
    )
    return page


def shares_drawing(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """One bar for each block and kind, as long as the removed share; None if nothing was removed."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    bars: list[Bar] = []
    y = 0.0
    for block in sorted({row["block"] for row in rows}, key=block_order):
        below = sorted((row for row in rows if row["block"] == block), key=lambda row: kinds.index(row["kind"]))
        for index, row in enumerate(below):
            share = row["removed"] / row["total"]
            bars.append(
                Bar(y, "" if index else block, 0.0, share * PLOT, f"{100 * share:.1f} %", kinds.index(row["kind"]))
            )
            y += BAR
        y += GAP
    zeroed = {row["kind"] for row in rows if not row["physical"]}
    legend = tuple(f"{kind} (zeroed, not physically gone)" if kind in zeroed else kind for kind in kinds)
    ticks = tuple((share * PLOT, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    return Drawing(tuple(bars), legend, ticks, y) if bars else None


def ratios_drawing(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """The interval of compressed time over dense time of each measured cell, with its point; None if none was."""
    if not rows:
        return None
    ends = [row["ratio"][name] for row in rows for name in ("lo", "hi")]
    low: float = math.floor(10 * min(*ends, 0.9)) / 10
    high: float = math.ceil(10 * max(*ends, 1.1)) / 10

    def x(ratio: float) -> float:
        return PLOT * (ratio - low) / (high - low)

    bars = tuple(
        Bar(
            index * (BAR + 2 * GAP) + GAP,
            cell_name(row),
            x(row["ratio"]["lo"]),
            x(row["ratio"]["hi"]),
            f"{row['ratio']['point']:.3f}",
            mark=x(row["ratio"]["point"]),
        )
        for index, row in enumerate(rows)
    )
    ticks = tuple((x(value), f"{value:g}") for value in dict.fromkeys((low, 1.0, high)))
    return Drawing(bars, (), ticks, len(rows) * (BAR + 2 * GAP) + GAP)
