"""The latency checks of a gate: each judged alone, then all together, then confirmed by a second measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toolchain.gate.accepts import Key
from toolchain.gate.checks import ACCEPT, Check, Number, Status
from toolchain.gate.config import Cell
from toolchain.gate.evidence import RATIO, TIME, Evidence, Missing
from toolchain.measure.comparison import UNDECIDED, Comparison, Undecided
from toolchain.measure.intervals import (
    RESAMPLES,
    Floats,
    Interval,
    block_log_ratios,
    median_interval,
    slot_medians,
    too_few,
)
from toolchain.measure.multiplicity import geometric_mean, holm, p_value_above
from toolchain.measure.samples import A, B
from toolchain.records import Record

ALONE = 5
"""Up to this many latency cells are judged each by itself, more of them by Holm's procedure."""
UNITS = {RATIO: "ratio", TIME: "ms"}
IDLE = "Retry on an idle machine"


class Summary(Record):
    """The geometric mean over cells of the time of the artifact over that of its baseline, with its own interval."""

    cells: int
    point: float
    lo: float
    hi: float


class Holm(Record):
    """How several latency checks were judged together."""

    hypotheses: int
    alpha: float


@dataclass(frozen=True)
class Allowance:
    """What a latency may be: at most its bound, or what was accepted, if anything was."""

    bound: float
    accepted: float | None

    @property
    def fails_above(self) -> float:
        """The value that the check fails above."""
        return max(self.bound, self.accepted or 0.0)

    def covers(self, point: float) -> bool:
        """Whether an accept that allows more than the bound allows what was measured, of which this is the logarithm."""
        return self.accepted is not None and self.accepted >= self.bound and point <= math.log(self.accepted)


def allowances(evidence: Evidence, accepted: Mapping[Key, Number]) -> dict[str, Allowance]:
    """Check → what it allows, for the latency checks of a cell."""
    return {
        name: Allowance(_bound(name, evidence.cell), accepted.get((evidence.cell.name, name)))
        for name in evidence.latency_checks
    }


def _bound(check: str, cell: Cell) -> float:
    """What a latency may be at most: milliseconds, or a ratio of times."""
    return (cell.budget.latency or 0.0) if check == TIME else 1 + (cell.relation.latency or 0.0)


def logs_of(check: str, comparison: Comparison) -> list[Floats]:
    """The logarithm of what a check judges, one array of blocks per session: B/A, or B in milliseconds."""
    if check == RATIO:
        return [block_log_ratios(session.slots_ns(B), session.slots_ns(A)) for session in comparison.sessions]
    return [np.log(slot_medians(session.slots_ns(B)) / 1e6) for session in comparison.sessions]


def estimate_of(check: str, comparison: Comparison) -> Interval:
    """The logarithm of what a check judges, RATIO or TIME, with its interval."""
    if check == RATIO:
        return comparison.ratio
    design = comparison.design
    return median_interval(logs_of(check, comparison), alpha=design.alpha, looks=design.looks, seed=design.seed)


def status_of(check: str, comparison: Comparison, allowance: Allowance) -> Status:
    """What a comparison says about one check.

    Beyond the bound, an accept holds as long as the measured value is no higher than what was accepted.
    """
    medians = [float(np.median(session)) for session in logs_of(check, comparison)]
    bound, fails_above = math.log(allowance.bound), math.log(allowance.fails_above)
    estimate = estimate_of(check, comparison)
    if check == TIME:
        # Absolute times drift with the machine, which no control sees or cancels: every session has to agree.
        if estimate.hi <= bound and max(medians) <= bound:
            return "pass"
        if estimate.lo > fails_above and min(medians) > fails_above:
            return "fail"
    else:
        verdict = comparison.verdict
        if verdict == "invalid":
            return "invalid"
        if verdict in ("pass", "improved"):
            return "pass"
        if too_few(medians, comparison.design.tau):
            return "inconclusive"  # as `judge` says
        if verdict == "regressed" and estimate.lo > fails_above:
            return "fail"
    return "accepted" if allowance.covers(estimate.point) else "inconclusive"


def undecided_by(checks: Mapping[str, Allowance]) -> Undecided:
    """Whether a comparison leaves one of some checks open: what the comparison of a gate's cell grows by."""
    return lambda comparison: any(status_of(name, comparison, each) in UNDECIDED for name, each in checks.items())


@dataclass(frozen=True)
class Case:
    """A latency check with the measurement that it is judged by, and those that were to confirm it."""

    check: str
    allowance: Allowance
    comparison: Comparison
    again: tuple[Comparison | Missing, ...] = ()


@dataclass(frozen=True)
class Judged:
    """The outcome of a case.

    Attributes:
        status: of the check.
        p_value: one-sided: how likely samples like these are if what is allowed is kept.
        note: why the outcome differs from that of the case alone, and what to do.
    """

    status: Status
    p_value: float
    note: str = ""


def judge_together(cases: Mapping[Key, Case]) -> tuple[dict[Key, Judged], Holm | None]:
    """What the first measurements say; over more than `ALONE` cells a failure has to survive Holm's procedure."""
    if not cases:
        return {}, None
    alpha = min(case.comparison.design.alpha for case in cases.values()) / 2  # one-sided
    resamples = max(RESAMPLES, math.ceil(4 * len(cases) / alpha))
    judged = {key: _alone(case, resamples) for key, case in cases.items()}
    if len({cell for cell, _ in cases}) <= ALONE:
        return judged, None
    rejected = holm([each.p_value for each in judged.values()], alpha)
    note = (
        f"It is too slow by itself, but not among {len(judged)} checks judged together (Holm). {IDLE}, or judge the cell "
        "in a gate of its own."
    )
    for (key, each), survives in zip(judged.items(), rejected, strict=True):
        if each.status == "fail" and not survives:
            judged[key] = replace(each, status="inconclusive", note=note)
    return judged, Holm(hypotheses=len(judged), alpha=alpha)


def _alone(case: Case, resamples: int) -> Judged:
    status, p = status_of(case.check, case.comparison, case.allowance), 1.0
    if status != "invalid":
        design, blocks = case.comparison.design, logs_of(case.check, case.comparison)
        above = math.log(case.allowance.fails_above)
        p = p_value_above(blocks, above, resamples=resamples, seed=design.seed) * design.looks
    return Judged(status, min(p, 1.0))


def confirmed(case: Case, judged: Judged) -> Judged:
    """The same after a second measurement, if the first one failed: what does not repeat leaves doubt."""
    if judged.status != "fail" or not case.again:
        return judged
    again = case.again[0]
    if isinstance(again, Missing):
        note = f"It was too slow, which could not be confirmed: {again.reason}. Run the gate again."
        return replace(judged, status="inconclusive", note=note)
    repeated = status_of(case.check, again, case.allowance)
    if repeated == "fail":
        return replace(judged, note=f"A fresh measurement confirmed it. Make the artifact faster, {ACCEPT}.")
    note = f"It was too slow at first and {repeated} in a fresh measurement. {IDLE}."
    return replace(judged, status="inconclusive", note=note)


def summary_of(cases: Sequence[Case]) -> Summary | None:
    """The mean over at least two valid comparisons with a baseline."""
    related = [case.comparison for case in cases if case.check == RATIO and case.comparison.verdict != "invalid"]
    if len(related) < 2:
        return None
    mean = geometric_mean([logs_of(RATIO, each) for each in related]).to_ratio()
    return Summary(cells=len(related), **mean)


def latency_check(case: Case, judged: Judged) -> Check:
    """The check of a case."""
    comparison, allowance = case.comparison, case.allowance
    estimate = estimate_of(case.check, comparison).to_ratio()
    unit = UNITS[case.check]
    shown = f"{estimate['point']:.3f} [{estimate['lo']:.3f}, {estimate['hi']:.3f}]"
    of = "ms" if unit == "ms" else "of the time of its baseline"
    said = [f"The artifact takes {shown} {of}; at most {allowance.bound:g} is allowed."]
    if allowance.accepted is not None:
        said.append(f"Up to {allowance.accepted:.3f} is accepted.")
    if judged.note:
        said.append(judged.note)
    elif judged.status == "invalid":
        said.append(_noise(comparison))
    elif judged.status == "inconclusive":
        said.append(_doubt(case))
    return Check(
        name=case.check,
        status=judged.status,
        unit=unit,
        value=estimate["point"],
        bound=allowance.bound,
        baseline=comparison.latency_ms(A) if case.check == RATIO else None,
        lo=estimate["lo"],
        hi=estimate["hi"],
        p_value=judged.p_value,
        reason=" ".join(said),
    )


def _noise(comparison: Comparison) -> str:
    strayed = math.expm1(max(abs(comparison.control.lo), abs(comparison.control.hi)))
    tolerance = math.ceil(1e3 * comparison.tau_min) / 1e3
    loosen = (
        f", or set relation.latency to {tolerance:g} or more, which this machine supports now" if tolerance < 1 else ""
    )
    return (
        f"The machine was too noisy: the baseline differed from itself by up to {100 * strayed:.1f} %. {IDLE}{loosen}."
    )


def _doubt(case: Case) -> str:
    """Why a measurement says neither that a bound is kept nor that it is not."""
    estimate, above = estimate_of(case.check, case.comparison), case.allowance.fails_above
    if estimate.lo <= math.log(above) < estimate.hi:
        return f"The interval holds {above:g}, so it may be kept or not. {IDLE}, or move the bound away from it."
    medians = [float(np.median(session)) for session in logs_of(case.check, case.comparison)]
    return f"Sessions differ by {100 * math.expm1(max(medians) - min(medians)):.1f} %. {IDLE}."


def untimed_check(name: str, evidence: Evidence) -> Check:
    """The check of a latency that was not measured."""
    first = evidence.attempts[0] if evidence.attempts else None
    assert not isinstance(first, Comparison)
    return missing_check(name, evidence, first, unit=UNITS[name], bound=_bound(name, evidence.cell))


def missing_check(name: str, evidence: Evidence, missing: Missing | None, *, unit: str, bound: float) -> Check:
    """The check of what was not measured in a cell: why it could not be, or None where parity had failed."""
    status: Status = "skipped"
    reason = "It was not measured, because parity with the baseline failed. Mend that first."
    if missing is not None:
        sentence = missing.reason if missing.reason.endswith((".", "!", "?")) else f"{missing.reason}."
        reason = f"It was not measured: {sentence}"
        if missing.why == "unavailable" and evidence.cell.required:
            status, reason = "fail", f"{reason} The cell is required, so this fails; run the gate where the target is."
        elif missing.why == "refused":
            status = "fail" if evidence.cell.required else "invalid"
            reason = (
                f"{reason} Set threads and affinity of the cell to what there is, or run the gate where there is more."
            )
        elif missing.why == "unfit":
            status, reason = "fail", f"{reason} Mend the artifact."
        elif missing.why == "failed":
            status, reason = "invalid", f"{reason} Run the gate again."
    return Check(name=name, status=status, unit=unit, bound=bound, reason=reason)
