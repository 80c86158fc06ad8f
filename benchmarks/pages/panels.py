"""Line, bar and cell charts as SVG text; equal numbers give equal bytes with one version of matplotlib.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; line and marker differ too.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib import colormaps, ticker
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A8A00")
MARKERS = "os^Dvp*X"
STYLE = {
    "svg.hashsalt": "slimvit",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
LINEAR_TO = 25.0
"""Per cent: an axis that reaches beyond is linear to 10 and logarithmic from there."""
THRESHOLD = 10.0
BINS = 60
"""Of a spread's axis."""
FRACTION = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")
DIGITS = 9
"""Of a number that count: processors differ in the last bits of a logarithm or of a sum."""


@dataclass(frozen=True)
class Point:
    """One number with its interval; x counts for lines only."""

    x: float
    y: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Series:
    """Points with a name; the number picks colour and marker. With `shades` it is a place on a scale of so many, from dark."""

    label: str
    points: tuple[Point, ...]
    number: int
    shades: int = 0


@dataclass(frozen=True)
class Lines:
    """A panel of lines.

    Attributes:
        title, x, y: texts.
        series: the lines.
        level: (label, y) that is drawn across.
        log: x is a scale of doublings.
        zero: 0 is drawn across.
        shares: y runs from 0 to 100.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None
    log: bool = False
    zero: bool = True
    shares: bool = False


@dataclass(frozen=True)
class LogLines(Lines):
    """A panel of lines over a logarithmic y axis."""


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars, the first on top: (label, the number, number of its colour, its meaning)."""

    title: str
    x: str
    bars: tuple[tuple[str, Point, int, str], ...]


@dataclass(frozen=True)
class Cells:
    """A panel of shares in per cent, rows × columns; what is from column `rule` on stands apart."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    x: str
    rule: int


@dataclass(frozen=True)
class Spread:
    """A panel of distributions over one axis, each drawn as a step line: (label, numbers, number of its colour).

    Attributes:
        title, x: texts.
        groups: the distributions.
        span: (left, right) end of the axis; what lies outside is counted at the end.
        rules: (label, x) that are drawn across.
    """

    title: str
    x: str
    groups: tuple[tuple[str, tuple[float, ...], int], ...]
    span: tuple[float, float]
    rules: tuple[tuple[str, float], ...]


def lines(panels: Sequence[Lines], *, shared: bool = False) -> str:
    """The panels side by side, with one legend below; `shared` gives them one y axis."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels) + 0.4, 3.9), layout="constrained")
        side_by_side: list[Any] = list(figure.subplots(1, len(panels), sharey=shared, squeeze=False)[0])
        entries: dict[str, Any] = {}
        for index, (axes, panel) in enumerate(zip(side_by_side, panels, strict=True)):
            _lines(axes, panel, entries)
            if shared and index:
                axes.set_ylabel("")
        if shared:  # after the labels, one of which it adds to
            _stretch(side_by_side[0].yaxis, [p for panel in panels for series in panel.series for p in series.points])
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)
        return _svg(figure, panels)


def _lines(axes: Any, panel: Lines, entries: dict[str, Any]) -> None:
    for series in panel.series:
        points = sorted(series.points, key=lambda p: p.x)
        number, shades = series.number, series.shades
        drawn = axes.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=[[max(0.0, p.y - p.lo) for p in points], [max(0.0, p.hi - p.y) for p in points]],
            color=_shade(number / max(1, shades - 1)) if shades else COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
        )
        entries.setdefault(series.label, drawn)
    if panel.level is not None:
        label, y = panel.level
        entries.setdefault(label, axes.axhline(y, color="0.35", linewidth=1.2, linestyle="--"))
    if panel.zero:
        axes.axhline(0, color="black", linewidth=0.8)
    if panel.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if panel.shares:
        axes.set_ylim(0, 105)
    if isinstance(panel, LogLines):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.grid(visible=True)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)


def bars(panels: Sequence[Bars]) -> str:
    """The panels side by side, each bar with its interval and its number, and one legend below."""
    with mpl.rc_context(STYLE):
        most = max(len(panel.bars) for panel in panels)
        figure = Figure(figsize=(4.7 * len(panels), 1.3 + 0.31 * most), layout="constrained")
        entries: dict[str, Any] = {}
        everything = [point for panel in panels for _, point, _, _ in panel.bars]
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for place, (_, point, number, meaning) in enumerate(panel.bars):
                around = [[max(0.0, point.y - point.lo)], [max(0.0, point.hi - point.y)]]
                drawn = axes.barh(place, point.y, xerr=around, color=COLOURS[number], height=0.66, capsize=2)
                entries.setdefault(meaning, drawn)
                at = max(point.hi, 0.0)
                axes.annotate(
                    _signed(f"{point.y:+.1f}"), (at, place), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
            axes.set_yticks(range(len(panel.bars)), [label for label, *_ in panel.bars])
            axes.invert_yaxis()
            axes.axvline(0, color="black", linewidth=0.8)
            axes.grid(visible=True, axis="x")
            axes.set_title(panel.title)
            axes.set_xlabel(panel.x)
            _stretch(axes.xaxis, everything, room=0.14)
        if len(entries) > 1:
            figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)
        return _svg(figure, panels)


def cells(panels: Sequence[Cells]) -> str:
    """The panels below one another, each cell with its number."""
    with mpl.rc_context(STYLE):
        width = max(len(panel.columns) for panel in panels)
        rows = [len(panel.rows) for panel in panels]
        figure = Figure(figsize=(2.6 + 0.62 * width, sum(rows) * 0.36 + 0.85 * len(panels)), layout="constrained")
        stacked = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
        for axes, panel in zip(stacked, panels, strict=True):
            axes.imshow(panel.values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            for y, row in enumerate(panel.values):
                for x, value in enumerate(row):
                    ink = "white" if value > 60 else "black"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)
            axes.set_xticks(range(len(panel.columns)), panel.columns)
            axes.set_yticks(range(len(panel.rows)), panel.rows)
            axes.tick_params(length=0)
            for edge in range(1, len(panel.columns)):
                axes.axvline(edge - 0.5, color="white", linewidth=4 if edge == panel.rule else 0.6)
            for edge in range(1, len(panel.rows)):
                axes.axhline(edge - 0.5, color="white", linewidth=0.6)
            axes.spines[:].set_visible(False)
            axes.set_title(panel.title)
            axes.set_xlabel(panel.x)
        return _svg(figure, panels)


def spreads(panels: Sequence[Spread]) -> str:
    """The panels below one another, over axes of equal numbers, and one legend below."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 1.75 * len(panels) + 0.5), layout="constrained")
        entries: dict[str, Any] = {}
        for axes, panel in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True):
            low, high = panel.span
            edges = [low + (high - low) * step / BINS for step in range(BINS + 1)]
            for label, numbers, number in panel.groups:
                inside = [min(max(each, low), high) for each in numbers]
                weights = [100 / len(inside)] * len(inside)
                style = {"histtype": "stepfilled", "alpha": 0.55, "color": COLOURS[number]}
                entries.setdefault(label, axes.hist(inside, edges, weights=weights, **style)[2][0])
            for (label, x), dashes in zip(panel.rules, ("-", "--"), strict=False):
                entries.setdefault(label, axes.axvline(x, color="black", linewidth=1.1, linestyle=dashes))
            axes.set_title(panel.title, loc="left")
            axes.set_ylabel("% of them")
            axes.grid(visible=True)
        axes.set_xlabel(panels[-1].x)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _signed(f"{value:+g}") if value else "0"))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2, fontsize=8)
        return _svg(figure, panels)


def _shade(share: float) -> tuple[float, ...]:
    """A colour from dark to light that also tells order in grey."""
    return tuple(colormaps["viridis"](0.85 * share))


def _stretch(axis: Any, points: Sequence[Point], room: float = 0.08) -> None:
    """Limits around all points, 0 and 1, on a scale on which both a tenth and a doubling can be read, where they need one."""
    low, high = min(0.0, *(p.lo for p in points)), max(1.0, *(p.hi for p in points))
    axes, is_y = axis.axes, axis.axis_name == "y"
    if high > LINEAR_TO:
        (axes.set_yscale if is_y else axes.set_xscale)("symlog", linthresh=THRESHOLD, linscale=1.5)
        axis.set_major_locator(ticker.FixedLocator([-10, -5, 0, 5, 10, 30, 100, 300, 1000]))
        axis.set_minor_locator(ticker.NullLocator())
        high *= 1 + 10 * room
        axis.set_label_text(f"{axis.get_label_text()} (logarithmic above {THRESHOLD:g})")
    margin = room * (min(high, THRESHOLD) - low)
    (axes.set_ylim if is_y else axes.set_xlim)(low - margin, high + room * (high - low))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _signed(f"{value:+g}") if value else "0"))


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def rounded(text: str) -> str:
    """A text with each fraction in it to `DIGITS` digits."""
    return FRACTION.sub(lambda match: f"{float(match[0]):.{DIGITS}g}", text)


def _svg(figure: Figure, numbers: object) -> str:
    """The figure, with a digest of its numbers, which does not depend on who draws it, and where."""
    digest = hashlib.sha256(rounded(repr(numbers)).encode()).hexdigest()[:16]
    about = {"Date": None, "Creator": f"matplotlib {mpl.__version__}", "Description": f"numbers {digest}"}
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=about)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
