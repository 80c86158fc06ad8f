"""The page of trials of the latency protocol: how often it said what, every verdict recomputed from its slots."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from kinds.trial import TrialCell, verdicts_of
from records import Results
from suite import Suite

from pages.panels import Spread, spreads
from pages.text import hardware, markdown, whole
from toolchain.measure.samples import SESSIONS, A, B

VERDICTS = ("pass", "improved", "regressed", "inconclusive", "invalid")
HEAD = ["Experiment", "Blocks A : B", "Done", *VERDICTS, "ms a call", "Median, s", "Longest, s"]
HEAD += ["Cores others kept busy", "Wanted"]
ALONE = """\
With one look, `--looks 1`, no comparison takes longer than that look. The first six sessions of each comparison
above, judged alone at 95 %; the seconds are the most that a comparison of one look took."""

SPREAD = """\
The six sessions of each comparison, read in two ways: **one after the other**, as if file A had been timed in the first three
and file B in the last three; and **taking turns**, as the protocol does it. Where both files are identical the truth is 0."""
PICTURE = "![How far both readings stray from the truth](spread.svg)"
TRUTHS = {
    "same-idle": ("Identical files, idle machine", 0.0),
    "same-loaded": ("Identical files, beside another process", 0.0),
}
TRUTHS |= {"slower-8": ("25 blocks against 27", 100 * (27 / 25 - 1))}


def share(hits: int, total: int) -> str:
    """A share with its Wilson interval, 95 %, in percent."""
    if total == 0:
        return "—"
    z, p = 1.96, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return f"{100 * p:.1f} % [{100 * max(0.0, middle - half):.1f}, {100 * min(1.0, middle + half):.1f}]"


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md; empty if nothing is recorded.

    Raises:
        ValueError: a record says another verdict than its slots give.
    """
    experiments: dict[str, list[TrialCell]] = {}
    for cell in suite.cells:
        if isinstance(cell, TrialCell):
            experiments.setdefault(cell.row, []).append(cell)
    rows, alone, machines = [], [], Counter[str]()
    for name, cells in experiments.items():
        records = [record for cell in cells if (record := results.read(suite.name, cell.name)) is not None]
        both = [verdicts_of(record) for record in records]
        verdicts, firsts = [each for each, _ in both], [each for _, each in both]
        seconds = [record.seconds["compare"] for record in records]
        one_look = [record.seconds["compare"] for record in records if len(record.result["slots_ns"]) <= SESSIONS]
        machines.update(hardware(record.machine) for record in records)
        others = [known for record in records if (known := record.result["cores_of_others"]) is not None]
        calls = [np.median([s for each in record.result["slots_ns"] for s in each[A]]) / 1e6 for record in records]
        rows.append(
            [
                f"`{name}`",
                f"{cells[0].depths[0]} : {cells[0].depths[1]}",
                f"{len(records)} of {len(cells)}",
                *(share(verdicts.count(verdict), len(records)) for verdict in VERDICTS),
                f"{np.median(calls):.1f}" if records else "—",
                f"{np.median(seconds):.0f}" if records else "—",
                f"{max(seconds):.0f}" if records else "—",
                f"{np.median(others):.2f}" if others else "—",
                cells[0].wanted,
            ]
        )
        counts = (share(firsts.count(verdict), len(records)) for verdict in VERDICTS)
        alone.append([f"`{name}`", *counts, f"{max(one_look):.0f}" if one_look else "—"])
    where = "\n".join(f"- {count} measured on: {machine}." for machine, count in machines.most_common())
    looks = markdown(["Experiment", *VERDICTS, "Longest, s"], alone)
    if not machines:
        return {}
    panels = [_spread(suite, results, name, experiments[name]) for name in TRUTHS if name in experiments]
    drawn = [panel for panel in panels if panel is not None]
    parts = [markdown(HEAD, rows), ALONE, looks, *([SPREAD, PICTURE] if drawn else []), where]
    return {"README.md": whole(suite, parts)} | ({"spread.svg": spreads(drawn)} if drawn else {})


def _spread(suite: Suite, results: Results, name: str, cells: list[TrialCell]) -> Spread | None:
    """How much longer B takes, in per cent, by either reading of an experiment's records; None where fewer than two are there."""
    apart, turns = list[float](), list[float]()
    for cell in cells:
        if (record := results.read(suite.name, cell.name)) is not None:
            sessions = record.result["slots_ns"][:SESSIONS]
            first, later = sessions[: SESSIONS // 2], sessions[SESSIONS // 2 :]
            slots = [np.concatenate([each[file] for each in half]) for file, half in ((A, first), (B, later))]
            apart.append(100 * (np.median(slots[1]) / np.median(slots[0]) - 1))
            logs = np.concatenate([np.log(np.array(each[B]) / np.array(each[A])) for each in sessions])
            turns.append(100 * math.expm1(np.median(logs)))
    title, truth = TRUTHS[name]
    groups = (("one after the other", tuple(apart), 1), ("taking turns", tuple(turns), 0))
    rules = (("no difference", 0.0), *([("MACs of B over MACs of A", truth)] if truth else []))
    span = (-8.0, 15.0)
    return Spread(title, "how much longer B takes than A, %", groups, span, rules) if len(turns) > 1 else None
