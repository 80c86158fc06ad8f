"""A gate's result as tables and sentences, for the terminal and as Markdown for a pull request."""

from __future__ import annotations

from toolchain.gate import CellResult, GateResult
from toolchain.gate.starts import Starts
from toolchain.measure.environment import describe_machine, slowed
from toolchain.report.markdown import inline, table_lines
from toolchain.report.tables import Table, number

LAYERS = 12
"""How many rows of an attribution are shown; all of them are in the JSON."""
USES = {
    "used": "used",
    "exceeded": "exceeded; the check is beyond what was accepted",
    "undecided": "the check is open; keep it until that is judged",
    "unused": "not needed any more; remove it",
    "moved": "accepted for another baseline, other pictures or another workload, so it covers nothing; accept the check again, or remove it",
    "expired": "expired, so it covers nothing; mend the regression, or accept it again",
    "unknown": "for a cell or check that the gate does not have; remove it",
}
"""Outcome of an accept → its words, with what to do."""


def gate_markdown(result: GateResult) -> str:
    """The result as Markdown: verdict, checks, what a reader has to know, and the size attribution folded away."""
    lines = [f"## slimvit gate: {result.headline}", "", *table_lines(checks_table(result))]
    lines += [f"{'' if index else chr(10)}- {inline(note)}" for index, note in enumerate(gate_notes(result))]
    for cell in result.cells:
        if (table := why_table(cell)) is not None:
            lines += [
                "",
                f"<details><summary>{inline(table.title)}</summary>",
                "",
                *table_lines(table),
                "",
                "</details>",
            ]
    return "\n".join(lines) + "\n"


def checks_table(result: GateResult) -> Table:
    """One row a check, failures first within the order of the cells."""
    order = ("fail", "invalid", "inconclusive", "skipped", "accepted", "pass")
    checks = sorted(result.checks, key=lambda pair: order.index(pair[1].status))
    rows = tuple((check.status, cell.name, check.name, one_line(check.reason)) for cell, check in checks)
    return Table("Checks", ("", "cell", "check", "what to know"), rows, text=(0, 1, 2, 3))


def gate_notes(result: GateResult) -> list[str]:
    """What explains the verdict: the mean over cells, multiplicity, what was skipped, accepts, the machine."""
    notes = []
    if (mean := result.summary) is not None:
        notes.append(
            f"Geometric mean over {mean.cells} cells: {mean.point:.3f} [{mean.lo:.3f}, {mean.hi:.3f}] of the "
            "baselines' time."
        )
    if result.holm is not None:
        notes.append(
            f"{result.holm.hypotheses} latency checks were judged together (Holm, one-sided α "
            f"{100 * result.holm.alpha:g} %)."
        )
    if result.skipped_cells:
        names = ", ".join(cell.name for cell in result.cells if cell.skipped)
        notes.append(f"Skipped, wholly or in part: {result.skipped_cells} of {len(result.cells)} cells ({names}).")
    notes += [
        f"Accept of {use.check} in {use.cell} up to {use.at_most:,} through {use.expires} ({one_line(use.reason)}): "
        f"{USES[use.state]}."
        for use in result.accept_uses
    ]
    environments = [each.environment for cell in result.cells for each in cell.comparisons]
    started = [starts for each in result.evidence for starts in each.starts if isinstance(starts, Starts)]
    environments += [starts.environment for starts in started]
    notes += [
        f"The baseline of {each.cell.name} was built by this job, and held to no digest."
        for each in result.evidence
        if each.built
    ]
    notes += [
        f"The artifact of {each.cell.name} is its baseline, byte for byte: its relations compare it with itself."
        for each in result.evidence
        if each.of_one_file
    ]
    for cell in result.cells:
        prints = [(s.fingerprint.before, s.fingerprint.after) for each in cell.comparisons for s in each.sessions]
        if said := slowed(prints):
            notes.append(f"While {cell.name} was timed: {'; '.join(said)}.")
    machines = [describe_machine(each) for each in environments]
    return [*notes, *(f"Measured on: {machine}." for machine in dict.fromkeys(machines))]


def why_table(cell: CellResult) -> Table | None:
    """What a cell's bytes, or their change, are made of, by layer; None if it was not asked for."""
    rows = cell.layers
    if rows is None:
        return None
    after = cell.artifact.size_bytes
    cells = [(one_line(row.layer), number(row.before), number(row.after), f"{row.change:+,}") for row in rows[:LAYERS]]
    if rest := rows[LAYERS:]:
        sums = sum(row.before for row in rest), sum(row.after for row in rest)
        cells.append((f"{len(rest)} more layers", number(sums[0]), number(sums[1]), f"{sums[1] - sums[0]:+,}"))
    if cell.baseline is None:
        title = f"{cell.name}: where {after:,} bytes are"
        return Table(title, ("layer", "bytes"), tuple((name, new) for name, _, new, _ in cells))
    before = cell.baseline.size_bytes
    title = f"{cell.name}: {after - before:+,} bytes, {before:,} → {after:,}"
    return Table(title, ("layer", "before", "after", "change"), tuple(cells))


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())
