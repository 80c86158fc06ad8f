"""The latency checks of a gate, judged together from their samples alone: no clock, so a stored gate is judged again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toolchain.gate.judgement import RATIO, Judgement, judgement_of, logs_of
from toolchain.measure.comparison import Comparison
from toolchain.measure.intervals import RESAMPLES
from toolchain.measure.multiplicity import geometric_mean, holm, p_value_above
from toolchain.measure.samples import Strict

ALONE = 5
"""Up to this many latency cells are judged each by itself, more of them by Holm's procedure."""


class Summary(Strict):
    """The geometric mean over cells of the time of the artifact over that of its baseline, with its own interval."""

    cells: int
    point: float
    lo: float
    hi: float


class Holm(Strict):
    """How several latency checks were judged together."""

    hypotheses: int
    alpha: float


@dataclass(frozen=True)
class Case:
    """One latency check with its first measurement.

    Attributes:
        cell: its name.
        check: RATIO or TIME.
        limit: the ratio of times or the milliseconds that are allowed.
        accepted: up to which value the check is accepted, if at all.
        comparison: the measurement.
    """

    cell: str
    check: str
    limit: float
    accepted: float | None
    comparison: Comparison

    @property
    def bound(self) -> float:
        """The value that the check fails beyond: the limit, or what was accepted."""
        return max(self.limit, self.accepted or 0.0)


@dataclass(frozen=True)
class Judged:
    """What came of a case.

    Attributes:
        judgement: what is said of it.
        p_value: one-sided: how likely samples like these are if the bound is kept.
        note: why it is not what the case by itself would say.
    """

    judgement: Judgement
    p_value: float
    note: str = ""


def judge_together(cases: Sequence[Case]) -> tuple[list[Judged], Holm | None]:
    """What is said of every case; over more than `ALONE` cells a regression has to survive Holm's procedure."""
    if not cases:
        return [], None
    alpha = min(case.comparison.design.alpha for case in cases) / 2  # one-sided
    resamples = max(RESAMPLES, math.ceil(4 * len(cases) / alpha))
    found = [_alone(case, resamples) for case in cases]
    if len({case.cell for case in cases}) <= ALONE:
        return found, None
    rejected = holm([each.p_value for each in found], alpha)
    for index, each in enumerate(found):
        if each.judgement == "regressed" and not rejected[index]:
            note = f"regressed by itself, not among {len(found)} checks together (Holm)"
            found[index] = replace(each, judgement="inconclusive", note=note)
    return found, Holm(hypotheses=len(found), alpha=alpha)


def _alone(case: Case, resamples: int) -> Judged:
    judgement, p = judgement_of(case.check, case.comparison, case.limit, case.accepted), 1.0
    if judgement != "invalid":
        design, blocks = case.comparison.design, logs_of(case.check, case.comparison)
        p = p_value_above(blocks, math.log(case.bound), resamples=resamples, seed=design.seed) * design.looks
    return Judged(judgement, min(p, 1.0))


def confirmed(case: Case, judged: Judged, again: Comparison | str) -> Judged:
    """What is said of a case that regressed, after a second measurement: one that does not repeat leaves doubt.

    Args:
        case: the case.
        judged: what its first measurement said: "regressed".
        again: the second measurement, or why there is none.
    """
    if isinstance(again, str):
        return replace(judged, judgement="inconclusive", note=f"could not be confirmed: {again}")
    repeated = judgement_of(case.check, again, case.limit, case.accepted)
    if repeated == "regressed":
        return replace(judged, note="confirmed in a fresh measurement")
    note = f"regressed at first, {repeated} in a fresh measurement"
    return replace(judged, judgement="inconclusive", note=note)


def summary_of(cases: Sequence[Case]) -> Summary | None:
    """The mean over at least two valid comparisons with a baseline."""
    related = [case.comparison for case in cases if case.check == RATIO and case.comparison.verdict != "invalid"]
    if len(related) < 2:
        return None
    mean = geometric_mean([logs_of(RATIO, each) for each in related]).to_ratio()
    return Summary(cells=len(related), **mean)
