"""Runs side by side: what each left, loses and takes, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.report.choice import loss_of
from toolchain.report.figures import Axis, Point, scatter
from toolchain.report.record import Report
from toolchain.report.sections import Part
from toolchain.report.tables import Table, counted, loss_words, number, size

SEVERAL = 3
"""So many runs on the front are needed for one of them to be its knee."""


@dataclass(frozen=True)
class Front:
    """The runs that no other beats: none is at most as large and loses at most as much, and less of one of them.

    Attributes:
        names: from the smallest file to the largest.
        knee: the one that lies farthest from the line between the ends, both axes scaled to their span; None of fewer than 3.
    """

    names: tuple[str, ...]
    knee: str | None


def front(reports: Mapping[str, Report]) -> Front:
    """The front of bytes of the fp32 ONNX file and of what is lost; empty where losses are not known."""
    known = {
        name: (report.compressed.bytes, loss) for name, report in reports.items() if (loss := _loss(report)) is not None
    }
    ordered = sorted(known, key=lambda name: (known[name], name))
    names = [
        name for place, name in enumerate(ordered) if all(known[other][1] > known[name][1] for other in ordered[:place])
    ]
    return Front(tuple(names), _knee([known[name] for name in names], names))


def _knee(points: Sequence[tuple[float, float]], names: Sequence[str]) -> str | None:
    if len(points) < SEVERAL:
        return None
    (left, top), (right, bottom) = points[0], points[-1]
    below = [1 - (x - left) / (right - left) - (y - bottom) / (top - bottom) for x, y in points]
    best = max(range(len(points)), key=lambda place: below[place])
    return names[best] if below[best] > 0 else None


def side_by_side(reports: Mapping[str, Report], failed: Mapping[str, str] | None = None) -> Part:
    """A table of runs, one row each, with a drawing of them.

    Args:
        reports: name → report, at least one.
        failed: name → why there is none.
    """
    best = front(reports)
    rows = list(reports.values())
    judged, figures = counted([report.compressed for report in rows])
    places = list(dict.fromkeys(row.place for report in rows for row in report.bench if row.precision == "fp32"))
    header = ("run", "parameters", "left", "ONNX, fp32", *judged, *(_head(*place) for place in places), "")
    body = [
        (
            name,
            number(report.compressed.params),
            f"{report.ratio.params:.3f}",
            size(report.compressed.bytes),
            *cells,
            *(_time(report, place) for place in places),
            "knee" if name == best.knee else "front" if name in best.names else "",
        )
        for (name, report), cells in zip(reports.items(), figures, strict=True)
    ]
    lines = [f"{name} has no report: {why}" for name, why in (failed or {}).items()]
    if best.names:
        lines.append("No run on the front is beaten by another in both bytes and quality.")
    if best.knee:
        lines.append(
            f"At the knee, {best.knee}, the front bends most: smaller files lose more for each byte, larger ones gain less."
        )
    table = Table("Runs side by side", header, tuple(body), text=(0, len(header) - 1))
    losses = {name: loss for name, report in reports.items() if (loss := _loss(report)) is not None}
    points = {name: Point(reports[name].compressed.bytes / 1e6, loss, name, 1) for name, loss in losses.items()}
    if len(points) < 2:
        return Part(table.title, table=table, lines=tuple(lines))
    first = reports[next(iter(points))]
    axes = Axis("ONNX file, fp32, MB"), Axis(loss_words(first.compressed), lambda share: f"{100 * share:g} %")
    dense = {
        Point(report.dense.bytes / 1e6, loss, "dense")
        for report in reports.values()
        if (loss := loss_of(report.dense)) is not None
    }
    drawn = (*sorted(dense, key=lambda point: point.x), *points.values())
    title = "Each run by its file, and the front"
    line = [points[name] for name in best.names]
    return Part(
        table.title,
        table=table,
        lines=tuple(lines),
        figures=(scatter(drawn, axes, title, ("dense", "compressed"), line),),
    )


def _loss(report: Report) -> float | None:
    return loss_of(report.compressed)


def _head(target: str, batch: int, threads: int) -> str:
    return f"{target}, b{batch}, t{threads}"


def _time(report: Report, place: tuple[str, int, int]) -> str:
    row = next(
        (row for row in report.bench if row.place == place and row.precision == "fp32" and row.rivals is None), None
    )
    return "–" if row is None else f"{row.compressed_ms:.3f} ms, {row.ratio.point:.3f} of dense"
