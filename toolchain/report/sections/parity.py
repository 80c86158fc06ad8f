"""The parity ladder, rung by rung."""

from __future__ import annotations

from toolchain.report.record import Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table


def _draw(report: Report) -> Part:
    rows = tuple(
        (
            f"{rung.from_} == {rung.to}",
            rung.verdict,
            "–" if rung.max_abs is None else f"{rung.max_abs:.1e}",
            rung.reason,
        )
        for rung in report.parity
    )
    table = Table("Parity", ("rung", "verdict", "max |Δ|", "reason"), rows, text=(0, 1, 3))
    return Part(table.title, table=table, brief=_brief(report))


def _brief(report: Report) -> tuple[str, ...]:
    """How many rungs hold and the largest deviation, then each that failed or was not run."""
    rungs = report.parity
    held = [rung for rung in rungs if rung.verdict == "pass"]
    exact = [rung.max_abs for rung in held if rung.tolerance.max_abs is not None]  # of others no |Δ| is judged
    differ = max((value for value in exact if value is not None), default=None)
    shown = "" if differ is None else f", max |Δ| {differ:.1e}"
    others = [rung for rung in rungs if rung.verdict != "pass"]
    return (
        f"{len(held)} of {len(rungs)} rungs hold{shown}",
        *(f"{rung.verdict.replace('_', ' ')}: {rung.from_} == {rung.to} ({rung.reason})" for rung in others),
    )


SECTION = Section("parity", _draw)
