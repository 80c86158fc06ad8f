"""Drawings of horizontal bars, in the user units of an SVG."""

from __future__ import annotations

from dataclasses import dataclass

BAR, GAP, LEFT, WIDTH = 14, 8, 210, 720
"""Height of a bar, the space between bars, the width of the labels, and that of the whole."""
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
class Figure:
    """A titled drawing.

    Attributes:
        title: above it.
        caption: how to read it.
        bars: from top to bottom.
        legend: names of the styles of the bars.
        ticks: vertical lines at (x, label).
        height: of it all.
    """

    title: str
    caption: str
    bars: tuple[Bar, ...]
    legend: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]
    height: float
