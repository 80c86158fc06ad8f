"""The checks of cold starts: memory, and the time until the first output."""

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
    return "accepted" if allowance.covers(found.point) else "inconclusive"


def needs_more(starts: Starts, allowances: Mapping[str, Allowance]) -> bool:
    """Whether one of some checks is open, so that there are to be more starts, if there may be."""
    return any(status_of(name, starts, each) == "inconclusive" for name, each in allowances.items())


def fails_at_first(evidence: Evidence, accepted: Mapping[Key, Number]) -> bool:
    """Whether the first starts of a cell say that one of its checks fails, which a gate confirms by starts that are taken later."""
    first = evidence.starts[0] if evidence.starts else None
    allowed = cost_allowances(evidence, accepted).items()
    return isinstance(first, Starts) and any(status_of(name, first, each) == "fail" for name, each in allowed)


def cost_check(name: str, evidence: Evidence, accepted: Mapping[Key, Number]) -> Check:
    """The check of what cold starts cost."""
    kind, _, metric = name.partition(".")
    cost, allowance = COSTS[metric], cost_allowances(evidence, accepted)[name]
    unit = "ratio" if kind == "relation" else cost.unit
    starts = evidence.starts[0] if evidence.starts else None
    if not isinstance(starts, Starts):
        return missing_check(name, evidence, starts, unit=unit, bound=allowance.bound)
    found = estimate_of(name, starts)
    if found is None:
        said = "It is not known: the system there does not tell how much memory a process holds. Run the gate on Linux."
        status: Status = "fail" if evidence.cell.required else "skipped"
        return Check(name=name, status=status, unit=unit, bound=allowance.bound, reason=said)
    status, advice = _judged(name, evidence, starts, allowance)
    ratio = found.to_ratio()
    of = f"of its baseline's {cost.unit}" if kind == "relation" else cost.unit
    shown = f"{_shown(ratio['point'])} [{_shown(ratio['lo'])}, {_shown(ratio['hi'])}] {of}"
    processes = f"by the median of {len(starts.pairs)} processes"
    sentences = [f"{cost.said} {shown}, {processes}; at most {_shown(allowance.bound)} is allowed."]
    if allowance.accepted is not None:
        sentences.append(f"Up to {_shown(allowance.accepted)} is accepted.")
    return Check(
        name=name,
        status=status,
        unit=unit,
        value=ratio["point"],
        bound=allowance.bound,
        lo=ratio["lo"],
        hi=ratio["hi"],
        reason=" ".join([*sentences, *advice]),
    )


def _judged(name: str, evidence: Evidence, starts: Starts, allowance: Allowance) -> tuple[Status, list[str]]:
    """(the status, what to do): what failed has to fail again in starts that were taken later; what does not repeat leaves doubt."""
    status = status_of(name, starts, allowance)
    if status == "inconclusive":
        above = _shown(allowance.fails_above)
        return status, [
            f"The interval holds {above}, so it may be kept or not. {IDLE}, or move the bound away from it."
        ]
    if status != "fail" or len(evidence.starts) < 2:
        return status, []
    again = evidence.starts[1]
    if not isinstance(again, Starts):
        return "inconclusive", [f"It was too much, which could not be confirmed: {again.reason} Run the gate again."]
    repeated = status_of(name, again, allowance)
    if repeated != "fail":
        return "inconclusive", [f"It was too much at first and {repeated} in starts that were taken later. {IDLE}."]
    return "fail", [f"Starts that were taken later confirmed it. {COSTS[name.partition('.')[2]].advice}, {ACCEPT}."]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
