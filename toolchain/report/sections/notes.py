"""Sentences on how the run went: weights, restrictions, the method, training, the latency budget, what is missing."""

from __future__ import annotations

from toolchain.compress.outcome import LatencyBudget, SizeBudget
from toolchain.outputs import FEATURES, Output, divergence_words
from toolchain.report.record import ClosedForm, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import finetune_line, number, size


def _draw(report: Report) -> Part:
    lines = [*report.notes, *(f"Restriction of this model: {each}." for each in report.restrictions)]
    if report.closed_form is not None:
        lines.append(_closed_form(report.closed_form, report.output))
    if report.finetune is not None:
        lines.append(finetune_line(report.finetune, report.output))
    lines += [_latency(row) for row in report.latency_budget if row.measured is not None]
    lines += [_size(row) for row in report.size_budget if row.requested is not None]
    lines += map(str, report.not_measured)
    lines += [f"{name}: {note}" for name, graph in report.graphs.items() for note in graph.notes]
    missed = [
        f"The latency budget on {row.target} is missed: {row.requested:.3f} of the dense model's time was asked for, "
        f"{row.measured:.3f} was measured for these shapes."
        for row in report.latency_budget
        if row.met is False
    ]
    missed += [
        f"The size budget of the {row.precision} file is missed: it has {number(row.bytes)} bytes, and {number(row.requested)} were asked for. "
        "Ask for that much less."
        for row in report.size_budget
        if row.met is False
    ]
    return Part("Notes", tuple(missed), lines=tuple(lines))


def _size(row: SizeBudget) -> str:
    rounds = (
        ""
        if row.rounding is None
        else f" Rounding alone moves the dense model's outputs by {row.rounding:.2g} nats an image."
    )
    has = "was refused" if row.bytes is None else f"has {size(row.bytes)}"
    return f"Size budget of the {row.precision} file: {size(row.requested)} was asked for, it {has}.{rounds}"


def _latency(row: LatencyBudget) -> str:
    return (
        f"Latency budget on {row.target}, batch {row.batch}, {row.threads} thread(s): {row.requested:.3f} of the dense "
        f"model's time was asked for, {row.measured:.3f} was measured for these shapes when the widths were chosen."
    )


def _closed_form(facts: ClosedForm, output: Output) -> str:
    head = "" if output in FEATURES else f", the classifier {'re-fitted' if facts.head_refitted else 'left as it was'}"
    far = "not a number" if facts.kl is None else f"{facts.kl:.3g} nats per validation image"
    return (
        f"Closed form: β = {facts.beta:g}{head}; {divergence_words(output)} from the dense model, "
        f"before any training, {far}."
    )


SECTION = Section("notes", _draw)
