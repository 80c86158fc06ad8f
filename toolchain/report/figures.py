"""Drawings of horizontal bars, and of points between two axes, in the user units of an SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BAR, GAP, LEFT, WIDTH = 14, 8, 310, 820
"""Height of a bar, the space between bars, the width of the labels, and that of the whole."""
PLOT = WIDTH - LEFT - 70


@dataclass(frozen=True)
class Bar:
    """A bar from `start` to `end` (0 … PLOT) with its label to the left and its value to the right; outside of `core` it is pale."""

    y: float
    label: str
    start: float
    end: float
    value: str
    style: int = 0
    mark: float | None = None
    core: tuple[float, float] | None = None


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


TALL, MARGIN, RIGHT, LABEL = 280, 70, 170, 14
"""Height of a plot of points, the space to its left and right, and what a label takes of the height."""


@dataclass(frozen=True)
class Dot:
    """A point with its label, which stands at `label_y`."""

    x: float
    y: float
    label: str
    style: int
    label_y: float


@dataclass(frozen=True)
class Scatter:
    """A titled drawing of points; `dots`, `line` and ticks are in its own units, y down.

    Attributes:
        title, caption: above it, and how to read it.
        legend: names of the styles of the dots.
        axes: what is to the right, and what is up.
        x_ticks, y_ticks: (place, label).
        line: through some of the dots.
    """

    title: str
    caption: str
    legend: tuple[str, ...]
    axes: tuple[str, str]
    dots: tuple[Dot, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    line: tuple[tuple[float, float], ...] = ()
    height: float = TALL


@dataclass(frozen=True)
class Point:
    """The data of a dot: its two numbers, its name, and the number of its colour."""

    x: float
    y: float
    label: str
    style: int = 0


@dataclass(frozen=True)
class Axis:
    """The name of an axis, and how a number on it is written."""

    name: str
    text: Callable[[float], str] = "{:g}".format


def scatter(
    points: Sequence[Point],
    axes: tuple[Axis, Axis],
    title: str,
    legend: tuple[str, ...] = (),
    line: Sequence[Point] = (),
) -> Scatter:
    """A scatter plot whose x axis begins at 0; less is better on both axes.

    Args:
        points: at least one.
        axes: x and y.
        title: of the drawing.
        legend: names of the styles.
        line: points that a line goes through, in its order.
    """
    across, up = _ticks([0.0, *(point.x for point in points)]), _ticks([point.y for point in points])
    wide = WIDTH - MARGIN - RIGHT

    def place(point: Point) -> tuple[float, float]:
        x = (point.x - across[0]) / (across[-1] - across[0])
        y = (point.y - up[0]) / (up[-1] - up[0])
        return MARGIN + x * wide, TALL - y * TALL

    ordered = sorted(points, key=lambda each: (each.y, each.x))
    places = [place(point) for point in ordered]
    labelled = [index for index, point in enumerate(ordered) if point.label]
    others = [places[index] for index, point in enumerate(ordered) if not point.label]
    levels = _levels([places[index] for index in labelled], [ordered[index].label for index in labelled], others)
    level_of = dict(zip(labelled, levels, strict=True))
    dots = tuple(
        Dot(*places[index], point.label, point.style, level_of.get(index, places[index][1]))
        for index, point in enumerate(ordered)
    )
    x_ticks = tuple(
        (MARGIN + wide * index / (len(across) - 1), axes[0].text(tick)) for index, tick in enumerate(across)
    )
    y_ticks = tuple((TALL - TALL * index / (len(up) - 1), axes[1].text(tick)) for index, tick in enumerate(up))
    through = tuple(place(point) for point in line)
    caption = "Left and down is better."
    return Scatter(title, caption, legend, (axes[0].name, axes[1].name), dots, x_ticks, y_ticks, through)


def _levels(
    places: Sequence[tuple[float, float]], labels: Sequence[str], others: Sequence[tuple[float, float]] = ()
) -> list[float]:
    """Where labels stand so that none covers another: pushed up from their points, and down again from above the plot.

    Args:
        places: (x, y) of the points, from the bottom up.
        labels: theirs; some twenty fit where all points lie at one place.
        others: points without a label, which none covers either while there is room.
    """
    ends = [x + 7 * len(label) + 12 for (x, _), label in zip(places, labels, strict=True)]

    def beside(one: int, other: int) -> bool:
        return places[one][0] < ends[other] and places[other][0] < ends[one]

    levels = [y for _, y in places]
    for index, (x, _) in enumerate(places):
        under = [there[1] for there in others if x < there[0] < ends[index]]
        while levels[index] > LABEL and any(abs(levels[index] - y) < LABEL for y in under):
            levels[index] -= LABEL / 2
    for index in range(len(levels)):
        while any(abs(levels[index] - levels[other]) < LABEL and beside(index, other) for other in range(index)):
            levels[index] -= LABEL / 2
    order = sorted(range(len(levels)), key=levels.__getitem__)
    for count, index in enumerate(order):
        above = (levels[other] + LABEL for other in order[:count] if beside(index, other))
        levels[index] = max(levels[index], -LABEL / 2, *above)
    return levels


def _ticks(numbers: Sequence[float]) -> list[float]:
    """About five round numbers, evenly apart, around all of some."""
    low, high = min(numbers), max(numbers)
    span = high - low or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(each for each in (1, 2, 2.5, 5, 10) if each * power >= raw)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * index for index in range(first, last + 1)]
