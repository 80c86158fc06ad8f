"""Compares runs: size, loss and latency of each, and the runs that no other dominates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.artifacts.onnx_file import FP32
from toolchain.measure.comparison import UNDECIDED
from toolchain.report.choice import loss_of
from toolchain.report.figures import Axis, Point, Scatter, scatter
from toolchain.report.record import Counts, Report
from toolchain.report.sections import Part
from toolchain.report.tables import Table, call_words, loss_words, number, percent, size

DENSE_WEIGHTS = "dense/model.safetensors"
"""The dense model's weights in the folder of a run."""
SEVERAL = 3
"""So many different points on the front are needed for one of them to be its knee."""


@dataclass(frozen=True)
class Front:
    """The runs that no other beats: none is at most as large and loses at most as much, and less of one of them.

    Attributes:
        names: from the smallest file to the largest.
        knee: the one that lies farthest from the line between the ends, both axes scaled to their span; None where there is no bend.
    """

    names: tuple[str, ...] = ()
    knee: str | None = None


@dataclass(frozen=True)
class RunFile:
    """The file that stands for a run: the one that its budget limits, else the fp32 file.

    Attributes:
        counts: how right it is.
    """

    precision: str
    bytes: int
    counts: Counts

    @property
    def loss(self) -> float | None:
        """As `loss_of`."""
        return loss_of(self.counts)


def file_of(report: Report) -> RunFile:
    """The file that stands for a run; of several that are limited, or one that was refused, the fp32 file."""
    limited = [row.precision for row in report.size_budget if row.requested is not None]
    for row in report.artifacts:
        if [row.precision] == limited and row.model == "compressed" and row.bytes is not None:
            return RunFile(row.precision, row.bytes, row)
    return RunFile(FP32, report.compressed.bytes, report.compressed)


def front(reports: Mapping[str, Report]) -> Front:
    """The front of bytes and loss of each run's file; empty where losses are not known or not of one kind."""
    if not _comparable(reports):
        return Front()
    points = {name: (file_of(report).bytes, file_of(report).loss or 0.0) for name, report in reports.items()}
    beaten = {
        name
        for name, (bytes_, loss) in points.items()
        if any(other[0] <= bytes_ and other[1] <= loss and other != (bytes_, loss) for other in points.values())
    }
    names = sorted(points.keys() - beaten, key=lambda name: (points[name], name))
    return Front(tuple(names), _knee({points[name]: name for name in reversed(names)}))


def _comparable(reports: Mapping[str, Report]) -> bool:
    """Whether all losses are known, of the same images, and shares of the same thing."""
    kinds = {(_judged_on(report), loss_words(report.compressed), _parent(report)) for report in reports.values()}
    return len(kinds) == 1 and all(file_of(report).loss is not None for report in reports.values())


def _judged_on(report: Report) -> tuple[str, int | None]:
    """The test pictures, by what is known of them, and how many labels they have; how others are drawn or mirrored is no matter."""
    return report.data.pictures.get("test") or report.data.digest, report.compressed.total


def _parent(report: Report) -> str:
    """What a loss is relative to: "" where it counts wrong images, else the weights of the dense model."""
    if report.compressed.error is None and (report.compressed.features is None or report.compressed.features.knn):
        return ""
    return next((file.sha256 for file in report.files if file.path == DENSE_WEIGHTS), report.model.model_dump_json())


def _knee(names: Mapping[tuple[float, float], str]) -> str | None:
    points = sorted(names)
    if len(points) < SEVERAL:
        return None
    (left, top), (right, bottom) = points[0], points[-1]
    below = {point: 1 - (point[0] - left) / (right - left) - (point[1] - bottom) / (top - bottom) for point in points}
    best = max(points, key=lambda point: below[point])
    return names[best] if below[best] > 1e-9 else None


def side_by_side(reports: Mapping[str, Report], failed: Mapping[str, str] | None = None) -> Part:
    """A table of runs, one row each, with a drawing of them.

    Args:
        reports: name → report, at least one.
        failed: name → what went wrong; such a run may have a report all the same.
    """
    best, places = front(reports), _places(reports)
    several = len({cpu for *_, cpu in places}) > 1
    precisions = {file_of(report).precision for report in reports.values()}
    file = f"ONNX, {next(iter(precisions))}" if len(precisions) == 1 else "ONNX"
    header = ("run", "parameters", "left", file, "quality", *(_head(place, several) for place in places), "")
    body = [
        (
            name,
            number(report.compressed.params),
            f"{report.ratio.params:.3f}",
            _size(file_of(report), alone=len(precisions) == 1),
            _quality(file_of(report).counts),
            *(_time(report, place) for place in places),
            "knee" if name == best.knee else "front" if name in best.names else "",
        )
        for name, report in reports.items()
    ]
    lines = [f"{name}{'' if name in reports else ' has no report'}: {why}" for name, why in (failed or {}).items()]
    lines += _explained(best, reports)
    table = Table("Runs side by side", header, tuple(body), text=(0, *range(4, len(header))))
    return Part(table.title, table=table, lines=tuple(lines), figures=_drawn(reports, best))


def _explained(best: Front, reports: Mapping[str, Report]) -> list[str]:
    if not best.names:
        return ["There is no front: quality is unknown, or of different images or kinds."] if len(reports) > 1 else []
    lines = ["No run on the front is beaten by another in both bytes and quality."]
    if best.knee:
        bends = "smaller files lose more for each byte, larger ones gain less"
        lines.append(f"At the knee, {best.knee}, the front bends most: {bends}.")
    return lines


def _drawn(reports: Mapping[str, Report], best: Front) -> tuple[Scatter, ...]:
    if len(reports) < 2 or not best.names:
        return ()
    points = {name: _point(file_of(report), name, 1) for name, report in reports.items()}
    known = [report.dense for report in reports.values() if loss_of(report.dense) is not None]
    dense = dict.fromkeys(_point(RunFile(FP32, figures.bytes, figures), "dense", 0) for figures in known)
    words = loss_words(next(iter(reports.values())).compressed)
    axes = Axis("ONNX file, MB"), Axis(words, lambda share: f"{100 * share:g} %")
    line = [points[name] for name in best.names]
    title = "Each run by its file, and the front"
    return (scatter((*dense, *points.values()), axes, title, ("dense", "compressed"), line),)


def _point(file: RunFile, label: str, style: int) -> Point:
    return Point(file.bytes / 1e6, file.loss or 0.0, label, style)


def _size(file: RunFile, *, alone: bool) -> str:
    return size(file.bytes) if alone else f"{size(file.bytes)}, {file.precision}"


def _quality(row: Counts) -> str:
    """What is known of how right a run's model is, in words, since runs may be judged in different ways."""
    if row.features is not None:
        knn = row.features.knn
        votes = "" if knn is None else f", k-NN {number(knn.right)} of {number(knn.total)} right"
        return f"error {percent(row.features.error)}{votes}"
    if row.error is not None:
        return f"squared error {percent(row.error)}"
    return (
        "–"
        if row.wrong is None
        else f"{number(row.wrong)} of {number(row.total)} wrong ({percent(row.accuracy)} right)"
    )


TimingColumn = tuple[str, int, int, str]


def _places(reports: Mapping[str, Report]) -> Sequence[TimingColumn]:
    """Where fp32 files were timed: target, batch, threads and processor, each once."""
    rows = [row for report in reports.values() for row in report.bench if row.precision == "fp32"]
    return list(dict.fromkeys((*row.place, str(row.environment.get("cpu", ""))) for row in rows))


def _head(place: TimingColumn, several: bool) -> str:
    target, batch, threads, cpu = place
    return f"{target}, {call_words(batch, threads)}{f', {cpu}' if several else ''}"


def _time(report: Report, place: TimingColumn) -> str:
    for row in report.bench:
        there = (*row.place, str(row.environment.get("cpu", "")))
        if row.precision == "fp32" and row.rivals is None and there == place:
            doubt = f", {row.verdict}" if row.verdict in UNDECIDED else ""
            return f"{row.compressed_ms:.3f} ms, {row.ratio.point:.3f} of dense{doubt}"
    return "–"
