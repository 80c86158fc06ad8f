"""Which file to take, where there is a choice."""

from __future__ import annotations

from toolchain.export.precisions import MADE_FOR_NOISE, PRECISIONS
from toolchain.report.record import Int8Choice, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import percent, size


def _draw(report: Report) -> Part:
    title = "Which file to take"
    choices = [row for row in report.artifacts if row.model == "compressed"]
    if len(choices) + sum(row.model == "compressed" and row.ran for row in report.engines) < 2:
        return Part(title)
    suggestion = report.suggestion
    lines = [f"{_of_which(report)}:", f"Smallest: {suggestion.smallest}."]
    lines += [
        f"Made for the size budget of {size(row.requested)}: the {row.precision} file, {size(row.bytes)}."
        for row in report.size_budget
        if row.met
    ]
    lines += [f"Fastest on {row}: {row.path}, {row.ratio.point:.3f} of the dense time." for row in suggestion.fastest]
    lines += [
        f"Least time on {row.machine}, {row.call}: {row.path} on {row.target}, "
        f"{row.ms:.3f} ms. Runtimes were not timed in pairs."
        for row in suggestion.quickest
    ]
    lines += [int8_line(row) for row in report.int8]
    lines += [f"Left out, as less accurate: {path}." for path in suggestion.left_out]
    lines += [f"{name}: {MADE_FOR_NOISE}" for name in _unseen(report)]
    return Part(title, lines=tuple(lines))


def _of_which(report: Report) -> str:
    """The files among which one is suggested."""
    most, rows = percent(report.suggestion.accuracy_loss), report.artifacts
    if any(row.total is not None or (row.features and row.features.knn) for row in rows):
        return f"Of the files that get at most {most} more of the images wrong than the compressed fp32 file"
    if any(row.error is not None or row.features is not None for row in rows):
        return f"Of the files with at most {most} more error than the compressed fp32 file"
    return "Of all compressed files, as accuracy is not known"


def _unseen(report: Report) -> list[str]:
    """The precisions of suggested files that were made for what they saw, where that was noise."""
    suggested = report.suggestion
    paths = {suggested.smallest, *(row.path for row in suggested.fastest), *(row.path for row in suggested.quickest)}
    rows = [row for row in (*report.artifacts, *report.engines) if report.synthetic and row.path in paths]
    known = {row.precision: PRECISIONS.get(row.precision) for row in rows}
    return [name for name, each in known.items() if each is not None and each.calibrated]


def int8_line(row: Int8Choice) -> str:
    """A line on the faster kind of int8 in a place."""
    ratio = row.ratio
    if ratio is None or row.rivals is None:
        return f"int8 on {row}: {row.chosen or 'slower than fp32'}."
    first, second = row.rivals
    took = f"{second} took {ratio.point:.3f} [{ratio.lo:.3f}, {ratio.hi:.3f}] of the time of {first}"
    if row.slower_than_fp32:
        return f"int8 on {row}: neither; the faster one is slower than fp32 ({took})."
    if row.chosen is None:
        return f"int8 on {row}: not chosen, as fp32 has no valid time to hold it against ({took})."
    known = "" if row.verified else ", a difference is not verified"
    return f"int8 on {row}: {row.chosen} ({took}{known})."


SECTION = Section("suggestion", _draw)
