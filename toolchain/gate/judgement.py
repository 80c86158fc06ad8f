"""What a comparison says about one latency check: the ratio of times, or a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from toolchain.measure.comparison import UNDECIDED, Comparison, Undecided
from toolchain.measure.intervals import (
    Floats,
    Interval,
    block_log_ratios,
    median_interval,
    slot_medians,
    too_few,
)
from toolchain.measure.samples import A, B

RATIO, TIME = "relation.latency", "budget.latency"
Judgement = Literal["pass", "regressed", "accepted", "inconclusive", "invalid"]


def judgement_of(check: str, comparison: Comparison, limit: float, accepted: float | None) -> Judgement:
    """What a comparison says about one check.

    Beyond the limit, an accept holds as long as the measured value is no higher than what was accepted.
    """
    tau = comparison.design.tau
    medians = [float(np.median(session)) for session in logs_of(check, comparison)]
    bound = math.log(max(limit, accepted or 0.0))
    estimate = estimate_of(check, comparison)
    if check == TIME:
        # Absolute times drift with the machine, which no control sees or cancels: every session has to agree.
        if estimate.hi <= math.log(limit) and max(medians) <= math.log(limit):
            return "pass"
        if estimate.lo > bound and min(medians) > bound:
            return "regressed"
    else:
        verdict = comparison.verdict
        if verdict == "invalid":
            return "invalid"
        if verdict in ("pass", "improved"):
            return "pass"
        if too_few(medians, tau):
            return "inconclusive"  # as `judge` says
        if verdict == "regressed" and estimate.lo > bound:
            return "regressed"
    return "accepted" if accepted is not None and estimate.point <= math.log(accepted) else "inconclusive"


def undecided_by(checks: Mapping[str, tuple[float, float | None]]) -> Undecided:
    """Whether a comparison leaves one of some checks open: what the comparison of a gate's cell grows by.

    Args:
        checks: check → (limit, up to which value it is accepted).
    """
    return lambda found: any(judgement_of(check, found, *bounds) in UNDECIDED for check, bounds in checks.items())


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
