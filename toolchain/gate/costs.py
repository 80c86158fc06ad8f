"""The checks of what a cold start costs, from the starts alone: memory, and the time until the first answer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from toolchain.gate.accepts import Key
from toolchain.gate.checks import ACCEPT, Check, Number, Status
from toolchain.gate.evidence import Evidence
from toolchain.gate.latency import IDLE, Allowance, missing_check
from toolchain.gate.starts import COSTS, LOOKS, Starts
from toolchain.measure.intervals import Interval, order_interval

ALPHA = 0.05
"""The probability of missing the truth, over all looks."""


def cost_allowances(evidence: Evidence, accepted: Mapping[Key, Number]) -> dict[str, Allowance]:
    """Check → what it allows, for the checks of a cell that take cold starts: an amount, or a ratio to the baseline's."""
    cell = evidence.cell
    return {name: Allowance(_bound(name, evidence), accepted.get((cell.name, name))) for name in evidence.cost_checks}


def _bound(name: str, evidence: Evidence) -> float:
    kind, _, metric = name.partition(".")
    asked = float(getattr(getattr(evidence.cell, kind), metric))
    return 1 + asked if kind == "relation" else asked


def estimate_of(name: str, starts: Starts) -> Interval | None:
    """The logarithm of what a check judges, the cost or its ratio to the baseline's; None if the system does not tell it."""
    kind, _, metric = name.partition(".")
    of = COSTS[metric].of
    costs = [
        (of(pair.artifact), of(pair.baseline) if kind == "relation" and pair.baseline else 1.0) for pair in starts.pairs
    ]
    known = [math.log(ours / theirs) for ours, theirs in costs if ours is not None and theirs is not None]
    return order_interval(known, ALPHA / len(LOOKS)) if len(known) == len(costs) else None


def status_of(name: str, starts: Starts, allowance: Allowance) -> Status:
    """What cold starts say about a check: the interval of the median lies below what is allowed, above it, or holds it."""
    found = estimate_of(name, starts)
    if found is None:
        return "skipped"
    if found.hi <= math.log(allowance.bound):
        return "pass"
    if found.lo > math.log(allowance.fails_above):
        return "fail"
    accepted = allowance.accepted
    return "accepted" if accepted is not None and found.point <= math.log(accepted) else "inconclusive"


def needs_more(starts: Starts, allowances: Mapping[str, Allowance]) -> bool:
    """Whether one of some checks is open, so that there are to be more starts, if there may be."""
    return any(status_of(name, starts, each) == "inconclusive" for name, each in allowances.items())


def cost_check(name: str, evidence: Evidence, accepted: Mapping[Key, Number]) -> Check:
    """The check of what cold starts cost."""
    kind, _, metric = name.partition(".")
    cost, allowance, starts = COSTS[metric], cost_allowances(evidence, accepted)[name], evidence.starts
    unit = "ratio" if kind == "relation" else cost.unit
    if not isinstance(starts, Starts):
        return missing_check(name, evidence, starts, unit=unit, bound=allowance.bound)
    found, status = estimate_of(name, starts), status_of(name, starts, allowance)
    if found is None:
        said = "It is not known: the system there does not tell how much memory a process holds. Run the gate on Linux."
        status = "fail" if evidence.cell.required else "skipped"
        return Check(name=name, status=status, unit=unit, bound=allowance.bound, reason=said)
    ratio = found.to_ratio()
    of = f"of its baseline's {cost.unit}" if kind == "relation" else cost.unit
    shown = f"{_shown(ratio['point'])} [{_shown(ratio['lo'])}, {_shown(ratio['hi'])}] {of}"
    sentences = [
        f"{cost.said} {shown}, by the median of {len(starts.pairs)} processes; at most {_shown(allowance.bound)} is allowed."
    ]
    if allowance.accepted is not None:
        sentences.append(f"Up to {_shown(allowance.accepted)} is accepted.")
    if status == "fail":
        sentences.append(f"{cost.advice}, {ACCEPT}.")
    elif status == "inconclusive":
        sentences.append(
            f"The interval holds the bound, so it may be kept or not. {IDLE}, or move the bound away from it."
        )
    return Check(
        name=name,
        status=status,
        unit=unit,
        value=ratio["point"],
        bound=allowance.bound,
        lo=ratio["lo"],
        hi=ratio["hi"],
        reason=" ".join(sentences),
    )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
